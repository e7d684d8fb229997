"""Generate support chats in which customers put a thumb up or down beside replies (tasks/support.py)."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from data_prep.chat_thumbs import ChatThumbs
from data_prep.source import Report, Source, write_json
from offline_lmrl.settings import setting
from offline_lmrl.tasks.support import Support

THUMBS = "thumbs.json"


@dataclass(frozen=True, kw_only=True)
class SupportLogs(Source):
    """Write chats with their thumbs (thumbs.json), and the train.jsonl, validation.jsonl and report.json made of them.

    The latter are those of `prepare chat-thumbs --input thumbs.json`.
    """

    chats: int = setting(400, "number of chats, each with one or two thumbs")
    validation: float = setting(0.2, "share of the chats that goes to validation")

    def make(self) -> Report:
        """Write the chats, and convert them."""
        chats = Support(held_out=False).chats(self.chats, self.seed)
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder) / THUMBS
            write_json(raw, chats)
            report = ChatThumbs(input=raw, output=self.output, validation=self.validation, seed=self.seed).make()
        write_json(Path(self.output) / THUMBS, chats)
        return report

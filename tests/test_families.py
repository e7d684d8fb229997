"""Every family of causal LMs from training to an exported checkpoint, or refused in one line before it is trained."""


import pytest
import torch

from offline_lmrl.algorithms import load_algorithm
from offline_lmrl.algorithms.run import DataConfig, ModelConfig, train
from offline_lmrl.data.errors import InputError
from offline_lmrl.data.io import write_trajectories
from offline_lmrl.data.trajectory import Turn
from offline_lmrl.data.windows import policy_window
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.evaluation.export import export
from offline_lmrl.models.guided import load_model
from tests.families import FAMILIES, small_model
from tests.test_training import TOKENIZER, logs

NOT_BUILT = {"dots3_note", "gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody"}
CACHE = "read on from a cache in a batch"  # positions are counted from the start of the padding
REFUSED = {
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert", "data2vec-text", "git",
                     "marian", "mbart", "mvp", "pegasus", "plbart", "recurrent_gemma", "roberta",
                     "roberta-prelayernorm", "trocr", "xlm-roberta", "xlm-roberta-xl"), CACHE),
    **dict.fromkeys(("blt", "minimax", "prophetnet", "reformer", "xlstm", "xmod"), "which cannot read text"),
    **dict.fromkeys(("openai-gpt", "rwkv", "xlm"), "expected one that takes past_key_values"),
    "cpmant": "read in a batch",
    "rembert": "found a decoder that gives 32 numbers per token before an LM head that reads",
    "xlnet": "max_length",
}  # fmt: skip
NOT_EXPORTED = {  # something lies between the decoder's hidden states and the LM head, or a cap behind it
    "beam", "bert", "bert-generation", "big_bird", "electra", "ernie", "gemma2", "gemma3n_text", "inkling2_text",
    "inkling_text", "megatron-bert", "minicpm3", "modernbert-decoder", "nanochat", "roc_bert", "roformer",
    "vaultgemma", "zamba",
}  # fmt: skip
ALWAYS = ("bart", "falcon_h1", "llama4_text", "mamba", "rembert")
HISTORIES = (
    (Turn("user", "you"),),
    (Turn("user", "you are at 7 right up down left"),),
    (Turn("user", "1 2"), Turn("assistant", "left"), Turn("user", "you are at 4 5")),
)


def run_of(model_type, folder):
    model = small_model(model_type)
    model.save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    write_trajectories(folder / "logs.jsonl", logs(8))
    args = load_algorithm("ilql")[0](
        output_dir=str(folder / "run"), use_cpu=True, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3,
        report_to="none", save_strategy="no", disable_tqdm=True, max_length=96,
        beta=1.0, q_reduce="mean", support=0.0, candidates=None, clip=None,
    )  # fmt: skip
    run = train("ilql", ModelConfig(path=str(folder / "base")), DataConfig(train=str(folder / "logs.jsonl")), args)
    model = load_model(run)
    for head in model.value_heads.targets():  # as far from constant as after a real training
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(run)
    return run


@pytest.mark.parametrize(
    "model_type", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_goes_all_the_way_or_is_refused_before_training(model_type, tmp_path):
    if model_type in NOT_BUILT:
        pytest.skip("transformers builds none from a small config")
    if model_type in REFUSED:
        with pytest.raises(InputError, match=REFUSED[model_type]) as refused:
            run_of(model_type, tmp_path)
        assert "\n" not in str(refused.value) and not (tmp_path / "run" / "config.yaml").exists()
        return
    policy = LanguagePolicy.load(run_of(model_type, tmp_path), device="cpu", max_new_tokens=6, beta=0.0)
    together = policy.start([1, 2, 3]).reply([0, 1, 2], HISTORIES)
    for seed, history, reply in zip([1, 2, 3], HISTORIES, together, strict=True):
        assert policy.start([seed]).reply([0], [history])[0].token_ids == reply.token_ids
        window = policy_window(history, policy.renderer, policy.window, 6, None, ())
        ids = torch.tensor([[*window, *reply.token_ids]])
        with torch.inference_mode():
            logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        said = logits[len(window) - 1 : -1].float().log_softmax(-1).gather(-1, ids[0, len(window) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(reply.policy_log_prob), said, atol=1e-3, rtol=0)
    try:
        assert not export(tmp_path / "run", tmp_path / "exported", device="cpu").converted
    except InputError:
        assert model_type in NOT_EXPORTED and not (tmp_path / "exported").exists()

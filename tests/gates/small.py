"""What the gates share: a tiny model from scratch, trained on the logs of a toy."""

import transformers

from offline_lmrl.models.loading import build_model
from offline_lmrl.tokens.tokenizers import train_tokenizer

SPEC = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 168,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 96,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


def fitted(config, trainer, folder, logs, seed, steps, *, spec=SPEC, **settings):
    """A trainer that has trained a model from scratch and saved its run into the folder."""
    tokenizer = train_tokenizer((turn.content for t in logs for turn in t.turns), 320)
    common = {
        "max_length": 96,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 512,
        "learning_rate": 2e-3,
        "adam_beta2": 0.98,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    transformers.set_seed(seed)
    args = config(output_dir=str(folder), max_steps=steps, seed=seed, **common | settings)
    run = trainer(build_model(spec, tokenizer), args, logs, None, tokenizer)
    run.train()
    run.save_model()
    return run

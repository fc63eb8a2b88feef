"""Small models of every kind that `export` takes, made from configurations, each saved as a real directory.

    python3 -m tests_torch.models DIR      # in clients/python; writes all of them, and text to cut shards from
"""

import pydoc_data.topics
import sys
from pathlib import Path

import peft
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

VOCABULARY, WIDTH = 512, 32
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>"]
BLOCKS = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=5, eos_token_id=5,
)  # fmt: skip
# The rows of classes and configurations in transformers.
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", BLOCKS | {"num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=VOCABULARY, n_positions=128, n_embd=WIDTH, n_layer=2, n_head=4, bos_token_id=5, eos_token_id=5)),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BLOCKS),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", BLOCKS | {"num_key_value_heads": 2, "num_local_experts": 4}),
    "bert": ("BertForMaskedLM", "BertConfig", BLOCKS),
    "t5": ("T5ForConditionalGeneration", "T5Config", dict(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=5,
    )),
    "vit": ("ViTForImageClassification", "ViTConfig", dict(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4, num_labels=5,
    )),
}  # fmt: skip
IMAGES, LORA = 40, "llama-lora"


def text() -> str:
    """Some 700 kB of English that every Python has."""
    return "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def tokenizer(words: str) -> transformers.PreTrainedTokenizerFast:
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([words], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", unk_token="[UNK]"
    )


def model(name: str) -> torch.nn.Module:
    kind, config, options = MODELS[name]
    torch.manual_seed(7)
    return getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()


def write(folder: Path) -> None:
    words = text()
    (folder / "held-out.txt").write_text(words[:120_000], encoding="utf-8")
    for name in MODELS:
        model(name).save_pretrained(folder / name)
        if name != "vit":
            tokenizer(words).save_pretrained(folder / name)
    write_adapter(folder)
    write_images(folder / "images")


def write_adapter(folder: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    made = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    made.save_pretrained(folder / LORA)


def write_images(folder: Path) -> None:
    chance = torch.Generator().manual_seed(3)
    folder.mkdir()
    images, labels = torch.rand(IMAGES, 3, 16, 16, generator=chance), torch.randint(5, (IMAGES,), generator=chance)
    save_file({"pixel_values": images, "labels": labels}, folder / "shard_1.safetensors")


class Tabular(torch.nn.Module):
    """A module of one's own: it gives the loss of each row. Its weights are other ones every time it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1))

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (self.layers(features).squeeze(1) - target) ** 2


def tabular() -> torch.nn.Module:
    return Tabular()


class Tied(torch.nn.Module):
    """A language model of one's own, with one matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.mix = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


def language() -> torch.nn.Module:
    return Tied()


def write_table(folder: Path) -> None:
    chance = torch.Generator().manual_seed(5)
    folder.mkdir()
    features = torch.randn(50, 6, generator=chance)
    save_file({"features": features, "target": features.sum(1)}, folder / "shard_1.safetensors")


class Mean(Tabular):
    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(features, target).mean()


class Branching(Tabular):
    """What it computes depends on a value, which a graph cannot."""

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(features, target) * (2 if features.sum().item() > 0 else 1)


class Restless(Tabular):
    """A factor that is no parameter and different every time."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = float(next(FACTORS))

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(features, target) * self.factor


FACTORS = iter(range(1, 1000))


def mean() -> torch.nn.Module:
    return Mean()


def branching() -> torch.nn.Module:
    return Branching()


def restless() -> torch.nn.Module:
    return Restless()


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir()
    write(out)
    write_table(out / "table")

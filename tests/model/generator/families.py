"""The models of ../architectures: what each is, how people wrap it for the export, and what it is measured on.

`causal` models give logits, and scorer cuts windows of tokens; the others give a loss for each row of their shard, as
`graph_loss` wants it. `shows` says what a model is here for.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

VOCAB, WINDOW, ROWS, ROW_TOKENS, CLASSES, SIDE = 48, 16, 3, 40, 5, 16
IGNORED = -100


class Causal(torch.nn.Module):
    """What everybody writes: without it the export fails on the model's own outputs."""

    def __init__(self, model):
        super().__init__()
        self.m = model

    def forward(self, input_ids):
        return self.m(input_ids=input_ids, use_cache=False).logits

    inputs, output, objective = ("input_ids",), "logits", "causal_lm"

    @staticmethod
    def data(rng):
        return {"tokens": rng.integers(3, VOCAB, (ROWS, ROW_TOKENS)).astype(np.int32)}


class Masked(Causal):
    """A token that is hidden is to be guessed; all others are ignored."""

    def forward(self, input_ids, labels):
        return over_tokens(self.m(input_ids=input_ids).logits, labels)

    inputs, output, objective = ("input_ids", "labels"), "loss", "graph_loss"

    @staticmethod
    def data(rng):
        tokens = rng.integers(3, VOCAB, (ROWS, WINDOW))
        hidden = rng.random(tokens.shape) < 0.25
        hidden[:, 3] = True
        return {"input_ids": np.where(hidden, 2, tokens), "labels": np.where(hidden, tokens, IGNORED)}


class Forced(Causal):
    """Teacher forcing: the decoder reads the labels, one place later."""

    def forward(self, input_ids, labels):
        shifted = self.m.prepare_decoder_input_ids_from_labels(labels=labels)
        return over_tokens(self.m(input_ids=input_ids, decoder_input_ids=shifted, use_cache=False).logits, labels)

    inputs, output, objective = ("input_ids", "labels"), "loss", "graph_loss"

    @staticmethod
    def data(rng):
        labels = rng.integers(3, VOCAB, (ROWS, WINDOW // 2))
        labels[0, -2:] = IGNORED
        return {"input_ids": rng.integers(3, VOCAB, (ROWS, WINDOW)), "labels": labels}


class Images(Causal):
    """Classification of images."""

    def forward(self, pixel_values, labels):
        # Not cross_entropy: the exporter declares its losses of each image to be a single number.
        chances = self.m(pixel_values=pixel_values).logits.log_softmax(1)
        return -chances.gather(1, labels[:, None])[:, 0]

    inputs, output, objective = ("pixel_values", "labels"), "loss", "graph_loss"

    @staticmethod
    def data(rng):
        pixels = rng.normal(size=(ROWS, 3, SIDE, SIDE)).astype(np.float32)
        return {"pixel_values": pixels, "labels": rng.integers(0, CLASSES, ROWS)}


def over_tokens(logits, labels):
    each = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return each.sum(1) / (labels != IGNORED).sum(1)


KINDS = {"causal": Causal, "masked": Masked, "forced": Forced, "images": Images}


@dataclass
class Family:
    name: str  # of the class
    options: dict
    shows: str = ""
    kind: str = "causal"
    config: str = ""
    # How the library computes them, where its default is not exported.
    experts: str = ""
    attention: str = ""
    adapters: tuple = ()

    def model(self):
        config = self.config or self.name.split("For")[0].removesuffix("LMHeadModel") + "Config"
        config = getattr(transformers, config)(**self.options)
        torch.manual_seed(7)
        model = getattr(transformers, self.name)(config)
        if self.experts:
            model.set_experts_implementation(self.experts)
        if self.attention:
            model.set_attn_implementation(self.attention)
        if self.adapters:
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(self.adapters)))
        return model.eval()


BLOCKS = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
GPT2 = dict(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
OPT = dict(vocab_size=VOCAB, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
           max_position_embeddings=32)
SMALL = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, bos_token_id=1, eos_token_id=2)
MAMBA2 = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8, n_groups=1, expand=2,
              chunk_size=8)
ENCODER = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
               max_position_embeddings=32, pad_token_id=0)
T5 = dict(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0, decoder_start_token_id=0)
BART = dict(vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=2)
RESNET = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES)
VIT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=SIDE, patch_size=4,
           num_labels=CLASSES)
EXPERTS = BLOCKS | dict(num_local_experts=3, num_experts_per_tok=2)

FAMILIES = {
    "llama": Family("LlamaForCausalLM", BLOCKS, "grouped queries; a head of its own"),
    "llama-tied": Family("LlamaForCausalLM", BLOCKS | {"tie_word_embeddings": True}, "tied head"),
    "llama-lora": Family("LlamaForCausalLM", BLOCKS, "PEFT: LoRA over a frozen base", adapters=("q_proj", "v_proj")),
    "mistral": Family("MistralForCausalLM", BLOCKS | {"sliding_window": 6}, "sliding window"),
    "mixtral": Family("MixtralForCausalLM", EXPERTS, "mixture of experts, two of three", experts="batched_mm"),
    "qwen2": Family("Qwen2ForCausalLM", BLOCKS, "biases of queries, keys and values"),
    "qwen3": Family("Qwen3ForCausalLM", BLOCKS | {"head_dim": 8}, "norms of queries and keys"),
    "gemma2": Family("Gemma2ForCausalLM", BLOCKS | {"head_dim": 8, "sliding_window": 6}, "sliding window in every second layer"),
    "gemma3": Family("Gemma3ForCausalLM", BLOCKS | {"head_dim": 8, "sliding_window": 6}, "sliding window", config="Gemma3TextConfig"),
    "phi3": Family("Phi3ForCausalLM", BLOCKS, "one matrix for queries, keys and values"),
    "gpt2": Family("GPT2LMHeadModel", GPT2, "learned positions; matrices the other way round"),
    "gptneox": Family("GPTNeoXForCausalLM", BLOCKS, "the checkpoint renames the head"),
    "opt": Family("OPTForCausalLM", OPT, "learned positions; tied head"),
    "olmo2": Family("Olmo2ForCausalLM", BLOCKS, "norms after the layers"),
    "smollm3": Family("SmolLM3ForCausalLM", BLOCKS, "layers without positions"),
    "granite": Family("GraniteForCausalLM", BLOCKS, "scaled residuals and logits"),
    "cohere": Family("CohereForCausalLM", BLOCKS, "parallel layers; tied head"),
    "stablelm": Family("StableLmForCausalLM", BLOCKS, "rotates a part of each head"),
    "falcon": Family("FalconForCausalLM", SMALL, "one key for all queries"),
    "bloom": Family("BloomForCausalLM", dict(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2), "ALiBi"),
    "mamba": Family("MambaForCausalLM", dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2),
                    "state space"),
    "mamba2": Family("Mamba2ForCausalLM", MAMBA2, "state space"),
    "t5": Family("T5ForConditionalGeneration", T5, "encoder and decoder, teacher forcing; relative positions", "forced", attention="eager"),
    "bart": Family("BartForConditionalGeneration", BART, "encoder and decoder, teacher forcing", "forced"),
    "bert": Family("BertForMaskedLM", ENCODER, "masked tokens", "masked"),
    "distilbert": Family("DistilBertForMaskedLM", dict(vocab_size=VOCAB, dim=16, n_layers=2, n_heads=2, hidden_dim=24,
                                                       max_position_embeddings=32), "masked tokens", "masked", config="DistilBertConfig"),
    "resnet": Family("ResNetForImageClassification", RESNET, "convolutions and batch norms", "images"),
    "vit": Family("ViTForImageClassification", VIT, "a transformer on patches of an image", "images"),
}

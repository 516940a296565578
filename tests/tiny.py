"""Tiny random models of every architecture named in the README, and tokenizers for them."""

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from horse_plugin import EditRecord, HORSEHyperParams, Query

WORDS = """
the capital of is located in mother tongue speaks Norway Oslo Lima France Paris piano guitar
plays born city Rome Kyoto language country who where what? Danielle Darrieux Toko Yasuda
unmanned aircraft Virgo Serpens constellation belongs to Delta""".split()
CORPUS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]


def _wrap(tok: Tokenizer, bos: bool) -> transformers.PreTrainedTokenizerFast:
    if bos:
        tok.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def bpe_tokenizer(bos=False) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, GPT-J, Llama-3, Qwen and SmolLM use."""
    tok = Tokenizer(models.BPE(unk_token=None))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _wrap(tok, bos)


def sentencepiece_tokenizer(bos=True) -> transformers.PreTrainedTokenizerFast:
    """Unigram over ▁-marked words, as SentencePiece models (Llama-2, Mistral, Gemma) are."""
    tok = tokenizers.SentencePieceUnigramTokenizer()
    tok.train_from_iterator(
        CORPUS,
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    return _wrap(tok._tokenizer, bos)


_SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {
    "vocab_size": 400,
    "n_embd": 32,
    "n_layer": 8,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(
        **{k: v for k, v in _SIZES.items() if k != "head_dim"}
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES),
    "gemma": lambda: transformers.GemmaConfig(**_SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZES, sliding_window=4),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SIZES, sliding_window=4),
    "phi3": lambda: transformers.Phi3Config(**{k: v for k, v in _SIZES.items() if k != "head_dim"}),
    "gptj": lambda: transformers.GPTJConfig(**_GPT, rotary_dim=4),
    "gpt2": lambda: transformers.GPT2Config(**_GPT),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in _SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
    ),
}
SECOND_PROJECTION = {
    "gptj": "transformer.h.{}.mlp.fc_out",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gpt-neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}


def model(architecture="llama", dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]()).to(dtype).eval()


def words(i: int, n: int = 1) -> str:
    return " ".join(WORDS[(i + k) % len(WORDS)] for k in range(n))


def records(n=6) -> list[EditRecord]:
    """Facts in the tokenizers' words; answers of one word and of two."""
    return [
        EditRecord(
            prompt=f"the capital of {words(i)} {words(7 * i)} is",
            target_new=words(i + 11, 1 + i % 2),
            rephrases=(f"where is the city of {words(i)} located in",),
            unrelated=(Query(f"the language of {words(i + 5)} is", words(i + 17)),),
        )
        for i in range(n)
    ]


def hparams(**changes) -> HORSEHyperParams:
    settings = {"model_name": "tiny", "rank": 4, "n_edits": 6, "dtype": "fp32", "device": "cpu"}
    return HORSEHyperParams(**settings | changes)

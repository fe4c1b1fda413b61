"""Tiny random checkpoints of BERT's family, each with a tokenizer of its kind, and with the heads it was pretrained
with."""

from pathlib import Path

FAMILIES = ("bert", "minilm", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "modernbert")
_TEXTS = [
    "I was thirsty, so I drank a glass of cold water.",
    "She went to the bank of the river; the bank gave her money.",
    "The weather is great today, and everyone is happy.",
    "He lost his keys again and felt sad about it all evening.",
    "theatre, café, naïve; 12 apples and 7 pears",
]
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_ROBERTA = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}


def build(family: str, folder: Path) -> Path:
    """Write such a checkpoint into a folder."""
    import torch
    import transformers as hf

    torch.manual_seed(7)
    tokenizer = _tokenizer(family)
    size = {**_SIZES, "vocab_size": len(tokenizer)}
    shifted = {**size, **_ROBERTA, "max_position_embeddings": 130}
    model = {
        "bert": lambda: hf.BertForPreTraining(hf.BertConfig(**size)),
        "minilm": lambda: hf.BertModel(hf.BertConfig(**size)),
        "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**shifted)),
        "xlm-roberta": lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**shifted)),
        "camembert": lambda: hf.CamembertForMaskedLM(hf.CamembertConfig(**shifted)),
        "distilbert": lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(
                vocab_size=len(tokenizer), dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=128
            )
        ),
        "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**size, embedding_size=16)),
        "modernbert": lambda: hf.ModernBertForMaskedLM(
            hf.ModernBertConfig(
                **size,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=0,
                eos_token_id=2,
                cls_token_id=0,
                sep_token_id=2,
            )
        ),
    }[family]()
    for name, weight in model.named_parameters():  # random ones are near 0: nothing would depend on anything
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(family: str):
    import transformers as hf
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    if family in ("bert", "minilm", "distilbert", "electra"):
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        own = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        own.normalizer = normalizers.BertNormalizer()
        own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        own.train_from_iterator(_TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
        own.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        own.decoder = decoders.WordPiece()
        names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
        kind = hf.BertTokenizerFast
        vocabulary = own.get_vocab()
        return kind(vocab=vocabulary, **{f"{name}_token": token for name, token in names.items()})
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    names = {
        "bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "mask_token": "<mask>",
    }  # fmt: skip
    if family in ("roberta", "modernbert"):
        own = Tokenizer(models.BPE())
        own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        own.decoder = decoders.ByteLevel()
        own.train_from_iterator(_TEXTS, trainer)
        own.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    else:
        own = Tokenizer(models.Unigram())
        own.normalizer = normalizers.NFKC()
        own.pre_tokenizer = pre_tokenizers.Metaspace()
        own.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>")
        own.train_from_iterator(_TEXTS, trainer)
        pair = "<s> $A </s> </s> $B </s>"
        own.post_processor = processors.TemplateProcessing("<s> $A </s>", pair, [("<s>", 0), ("</s>", 2)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=own, **names)

"""What each architecture can do in a run, tried on tiny random models; what it cannot is one line before anything is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.builders import TOKENIZERS, make_table, make_texts
from support.checkpoints import save_former
from transformers import AutoModel, AutoModelForSequenceClassification

from research.errors import InputError
from research.models.classifiers import EncoderClassifier, StudentModel
from research.models.cutting import cut_layers, find_layers, keep_layers, sample_ids
from research.models.encoders import load_encoder, load_model_config, load_tokenizer
from research.models.native import build_native
from research.models.pooling import POOLINGS
from research.models.reading import LARGEST_SIZE
from research.models.saved import load_classifier, save_classifier
from research.models.trial import Demands, try_classifier, try_pretrained
from research_config import ExperimentConfig
from research_main import main

LAYERS, WIDTH, POSITIONS = 3, 32, 96
BERT_LIKE: dict[str, Any] = {
    "num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
GPT_LIKE = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 4, "n_positions": POSITIONS}
LLAMA_LIKE = BERT_LIKE | {"num_key_value_heads": 2}
XLM_LIKE = {"n_layers": LAYERS, "emb_dim": WIDTH, "n_heads": 4, "max_position_embeddings": POSITIONS}
BART_LIKE: dict[str, Any] = {
    "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": POSITIONS,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Expected:
    """An architecture's configuration and what it gives.

    Args:
        lacks: Of states, maps, relations, cut: what it refuses.
        most: Longest text it takes, None without a limit.
    """

    config: str
    options: dict[str, Any]
    lacks: tuple[str, ...] = ()
    most: int | None = POSITIONS
    causal: bool = False


OWN_ATTENTION = ("relations",)
NO_MAPS = ("maps", "relations")
ARCHITECTURES = {
    "bert": Expected("BertConfig", BERT_LIKE),
    "electra": Expected("ElectraConfig", BERT_LIKE | {"embedding_size": 16}),
    "distilbert": Expected(
        "DistilBertConfig",
        {"n_layers": LAYERS, "dim": WIDTH, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": POSITIONS},
    ),
    "roberta": Expected("RobertaConfig", BERT_LIKE, most=POSITIONS - 2),
    "xlm-roberta": Expected("XLMRobertaConfig", BERT_LIKE, most=POSITIONS - 2),
    "albert": Expected("AlbertConfig", BERT_LIKE | {"embedding_size": 16}, ("cut",)),
    "albert of groups": Expected("AlbertConfig", BERT_LIKE | {"embedding_size": 16, "num_hidden_groups": LAYERS}, ("cut",)),
    "deberta-v2": Expected("DebertaV2Config", BERT_LIKE, OWN_ATTENTION),
    "modernbert": Expected("ModernBertConfig", BERT_LIKE, ("cut",), most=None),
    "mpnet": Expected("MPNetConfig", BERT_LIKE, OWN_ATTENTION, most=POSITIONS - 2),
    "roformer": Expected("RoFormerConfig", BERT_LIKE, OWN_ATTENTION),
    "convbert": Expected("ConvBertConfig", BERT_LIKE | {"embedding_size": WIDTH}, OWN_ATTENTION),
    "layoutlm": Expected("LayoutLMConfig", BERT_LIKE),
    "squeezebert": Expected("SqueezeBertConfig", BERT_LIKE | {"embedding_size": WIDTH}, OWN_ATTENTION),
    "esm": Expected("EsmConfig", BERT_LIKE | {"mask_token_id": 4, "token_dropout": True}, ("cut",), most=POSITIONS - 2),
    "longformer": Expected("LongformerConfig", BERT_LIKE | {"attention_window": 8}, NO_MAPS, most=POSITIONS - 2),
    "fnet": Expected("FNetConfig", BERT_LIKE, NO_MAPS),
    "nystromformer": Expected("NystromformerConfig", BERT_LIKE, OWN_ATTENTION),
    "yoso": Expected("YosoConfig", BERT_LIKE, NO_MAPS),
    "xlm": Expected("XLMConfig", XLM_LIKE, ("relations", "cut")),
    "flaubert": Expected("FlaubertConfig", XLM_LIKE, ("relations", "cut")),
    "xlnet": Expected("XLNetConfig", {"n_layer": LAYERS, "d_model": WIDTH, "n_head": 4, "d_inner": 64}, OWN_ATTENTION, most=None),
    "funnel": Expected(
        "FunnelConfig",
        {"d_model": WIDTH, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1, 1], "num_decoder_layers": 1},
        ("states", *NO_MAPS, "cut"),
        most=None,
    ),
    "bart": Expected("BartConfig", BART_LIKE, ("states", *NO_MAPS)),
    "gpt2": Expected("GPT2Config", GPT_LIKE, causal=True),
    "bloom": Expected(
        "BloomConfig", {"n_layer": LAYERS, "hidden_size": WIDTH, "n_head": 4}, OWN_ATTENTION, most=None, causal=True
    ),
    "opt": Expected("OPTConfig", BERT_LIKE | {"ffn_dim": 64, "word_embed_proj_dim": WIDTH}, causal=True),
    "llama": Expected("LlamaConfig", LLAMA_LIKE, most=None, causal=True),
    "qwen2": Expected("Qwen2Config", LLAMA_LIKE, most=None, causal=True),
    "qwen3": Expected("Qwen3Config", LLAMA_LIKE | {"head_dim": 8}, most=None, causal=True),
    "gemma3": Expected("Gemma3TextConfig", LLAMA_LIKE | {"head_dim": 8}, most=None, causal=True),
    "lfm2": Expected(
        "Lfm2Config",
        LLAMA_LIKE | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        NO_MAPS,
        most=None,
        causal=True,
    ),
    "mamba": Expected("MambaConfig", {"num_hidden_layers": LAYERS, "hidden_size": WIDTH}, NO_MAPS, most=None, causal=True),
}  # fmt: skip
UNUSABLE = {
    "t5": Expected("T5Config", {"d_model": WIDTH, "d_ff": 64, "d_kv": 8, "num_layers": LAYERS, "num_heads": 4}),
    "bros": Expected("BrosConfig", BERT_LIKE),
    "nystromformer of long texts": Expected("NystromformerConfig", BERT_LIKE | {"segment_means_seq_len": 512}),
    "dpr": Expected("DPRConfig", BERT_LIKE),
    "vit": Expected("ViTConfig", {"num_hidden_layers": 1, "hidden_size": WIDTH, "num_attention_heads": 4, "image_size": 32}),
}


def save_tiny(expected: Expected, folder: Path, vocab_size: int = 60, seed: int = 0) -> str:
    config = getattr(transformers, expected.config)(vocab_size=vocab_size, pad_token_id=1, **expected.options)
    config.architectures = ["FunnelModel"] if config.model_type == "funnel" else []
    torch.manual_seed(seed)
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("architectures")
    return {name: save_tiny(expected, root / name) for name, expected in (ARCHITECTURES | UNUSABLE).items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return TOKENIZERS["wordpiece"](make_texts(12), tmp_path_factory.mktemp("tokenizer"), 60)


def fault_of(name: str, demands: Demands) -> str | None:
    """Return the one line that refuses a model, None when it is accepted."""
    try:
        try_pretrained(name, demands)
    except InputError as error:
        fault = str(error)
    else:
        return None
    assert len(fault.splitlines()) == 1
    return fault


DEMANDS = {
    "states": Demands(16, "mean", hidden=(1, 3)),
    "maps": Demands(16, "mean", attention=(1, 3)),
    "relations": Demands(16, "mean", attention=(2,), relations=True),
    "cut": Demands(16, "mean", layers=2),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_is_refused_for_what_it_lacks_and_nothing_else(name: str, folders: dict[str, str]) -> None:
    expected = ARCHITECTURES[name]
    for what, demands in DEMANDS.items():
        fault = fault_of(folders[name], demands)
        assert (fault is not None) == (what in expected.lacks), (what, fault)
    fault = fault_of(folders[name], Demands(16, "cls"))
    assert fault is None if not expected.causal else fault is not None and "use --pooling last or mean" in fault
    assert fault_of(folders[name], Demands(16, "last")) is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_longest_text_of_an_architecture_is_known_before_the_run(name: str, folders: dict[str, str]) -> None:
    most = ARCHITECTURES[name].most
    assert fault_of(folders[name], Demands(most or POSITIONS, "mean")) is None
    fault = fault_of(folders[name], Demands((most or POSITIONS) + 1, "mean"))
    if most is None:
        assert fault is None
    else:
        assert fault == f"{folders[name]}: takes at most {most} tokens, got --max_length {most + 1}"


# Those whose classifier transformers does not have, or that holds another encoder.
HEADLESS = {"funnel", "lfm2", "mamba"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_native_head_of_an_architecture_is_saved_as_transformers_loads_it_or_refused(
    name: str, folders: dict[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    fault = fault_of(folders[name], Demands(16, "cls", native=True))
    assert (fault is not None) == (name in HEADLESS), fault
    if fault is not None:
        assert "use --student_head mlp" in fault
        return
    torch.manual_seed(0)
    student = build_native(load_encoder(folders[name], pooler=True), ("bully", "spam"), 0.1).eval()
    save_classifier(student, tokenizer, tmp_path, {"labels": ["bully", "spam"]})
    stock, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, mask = sample_ids(student.backbone_config)
    # Some take other things between ids and mask, and FNet no mask.
    inputs = {"input_ids": ids} if name == "fnet" else {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        torch.testing.assert_close(student(ids, mask)["logits"], stock.eval()(**inputs).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [LAYERS, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_student_gives_equal_logits(
    name: str, layers: int, folders: dict[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    encoder = load_encoder(folders[name])
    if layers < LAYERS and "cut" in ARCHITECTURES[name].lacks:
        with pytest.raises(InputError, match="cannot be cut; choose another student"):
            cut_layers(encoder, layers)
        return
    torch.manual_seed(1)
    student = StudentModel(num_labels=2, classifier_hidden_size=4, pooling="last", encoder=cut_layers(encoder, layers)).eval()
    save_classifier(student, tokenizer, tmp_path, {"labels": ["bully", "spam"]})
    loaded = load_classifier(str(tmp_path), ("bully", "spam")).model.eval()
    batch = sample_ids(student.backbone_config)
    with torch.no_grad():
        assert torch.equal(loaded(*batch)["logits"], student(*batch)["logits"])


@pytest.mark.parametrize("name", UNUSABLE)
def test_architecture_that_takes_no_plain_texts_is_refused(name: str, folders: dict[str, str]) -> None:
    fault = fault_of(folders[name], Demands(16, "mean"))
    assert fault is not None and "cannot be used as an encoder of texts: " in fault


# Cutting, saving, loading


def test_layers_that_change_their_kind_with_their_place_are_not_saved_as_another_model(
    folders: dict[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    """ModernBERT builds its first layer without a norm, which any other kept in its place has."""
    encoder: Any = load_encoder(folders["modernbert"])
    name = find_layers(encoder)
    assert name is not None
    keep_layers(encoder, name, [1, 2])
    student = StudentModel(num_labels=2, encoder=encoder)
    with pytest.raises(InputError, match=r"holds 1 weights, as layers\.0\.attn_norm\.weight, that the model of its config"):
        save_classifier(student, tokenizer, tmp_path, {"labels": ["bully", "spam"]})


def test_saving_notices_other_logits_of_what_it_wrote(folders: dict[str, str], tokenizer: Any, tmp_path: Path) -> None:
    student = StudentModel(folders["bert"], 2)
    student.backbone_config.layer_norm_eps = 1.0
    with pytest.raises(InputError, match="the bert model saved there gives other logits"):
        save_classifier(student, tokenizer, tmp_path, {"labels": ["bully", "spam"]})


def test_saving_leaves_mode_and_random_numbers_as_they_were(folders: dict[str, str], tokenizer: Any, tmp_path: Path) -> None:
    student = StudentModel(folders["bert"], 2).train()
    before = torch.random.get_rng_state()
    save_classifier(student, tokenizer, tmp_path, {"labels": ["bully", "spam"]})
    assert torch.equal(torch.random.get_rng_state(), before)
    assert student.training and student.encoder.training


def test_file_with_more_layers_than_its_config_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    encoder: Any = AutoModel.from_pretrained(folders["bert"])
    encoder.config.num_hidden_layers = 2
    encoder.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"16 weights, as encoder\.layer\.2\..* another model would run"):
        load_encoder(str(tmp_path))


def test_heads_of_other_tasks_are_left_aside(folders: dict[str, str], tmp_path: Path) -> None:
    transformers.BertForMaskedLM.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path)) is not None


def test_trial_leaves_a_checkpoint_as_it_was(folders: dict[str, str]) -> None:
    model = StudentModel(folders["bert"], 2).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try_classifier("here", model, Demands(16, "cls", hidden=(1,), attention=(1,)))
    assert model.training and model.num_layers == LAYERS
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# The text vector


def test_poolings_are_those_of_the_flag() -> None:
    assert ExperimentConfig(pooling="last").pooling in POOLINGS


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_pooling_reads_the_last_real_token(side: str, folders: dict[str, str]) -> None:
    model = StudentModel(folders["gpt2"], 2, pooling="last").eval()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    if side == "left":
        mask = mask.flip(1)
    states = torch.randn(2, 5, WIDTH)
    last = (4, 4) if side == "left" else (4, 2)
    expected = torch.stack([model.classifier(states[row, place]) for row, place in enumerate(last)])
    torch.testing.assert_close(model.classify(states, mask), expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_encoder_and_head_without_settings_take_the_pooling_of_the_flag(
    pooling: str, folders: dict[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    student = StudentModel(folders["bert"], 2, pooling=pooling).eval()
    save_former(student, tokenizer, tmp_path, {})
    (tmp_path / "classifier.json").unlink()
    loaded = load_classifier(str(tmp_path), ("bully", "spam"), pooling=pooling).model.eval()
    assert isinstance(loaded, EncoderClassifier) and loaded.pooling == pooling
    batch = sample_ids(student.backbone_config)
    with torch.no_grad():
        assert torch.equal(loaded(*batch)["logits"], student(*batch)["logits"])


# The command


def run_student(tmp_path: Path, name: str, *flags: str, **options: Any) -> int:
    """Run a student without a teacher, whose model and tokenizer are made for it."""
    texts = make_texts(60)
    built = TOKENIZERS["wordpiece"](texts, tmp_path / "model", 80)
    expected = dataclasses.replace(ARCHITECTURES[name], options=ARCHITECTURES[name].options | options)
    save_tiny(expected, tmp_path / "model", vocab_size=len(built))
    table = make_table(tmp_path / "data.csv", rows=60)
    argv = ["--dataset_path", str(table), "--pipeline", "student_only", "--student_path", str(tmp_path / "model")]
    argv += ["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache"), "--epochs", "1", "--device", "cpu"]
    return main([*argv, "--batch", "16", *flags])


@pytest.mark.parametrize(
    ("name", "flags", "line"),
    [
        ("llama", ("--max_length", "16"), "so --pooling cls would give every text the same scores; use --pooling last or mean"),
        ("roberta", ("--max_length", "128"), "takes at most 94 tokens, got --max_length 128"),
        ("modernbert", ("--max_length", "16", "--student_layers", "2"), "the layers of a modernbert model cannot be cut"),
    ],
)
def test_run_refuses_in_one_line_and_writes_nothing(
    name: str, flags: tuple[str, ...], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_student(tmp_path, name, *flags) == 2
    errors = [entry for entry in capsys.readouterr().err.splitlines() if entry.startswith("error: ")]
    assert len(errors) == 1 and line in errors[0]
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_run_of_a_decoder_classifies_by_its_last_token(tmp_path: Path) -> None:
    assert run_student(tmp_path, "llama", "--max_length", "16", "--pooling", "last") == 0
    lines = (tmp_path / "run" / "predictions.csv").read_text(encoding="utf-8").splitlines()
    probs = {line.split(",")[-5:][0] for line in lines[1:]}
    assert len(probs) == len(lines) - 1
    saved = load_classifier(str(tmp_path / "run" / "student")).model
    assert isinstance(saved, EncoderClassifier) and saved.pooling == "last"


# Folders that tell nonsense


@pytest.mark.parametrize("field", ["num_hidden_layers", "vocab_size", "hidden_size", "max_position_embeddings"])
def test_sizes_that_nothing_can_hold_are_refused_at_once(field: str, folders: dict[str, str], tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folders["bert"])
    setattr(config, field, 10**12)
    config.save_pretrained(tmp_path)
    for load in (lambda: load_model_config(str(tmp_path)), lambda: load_encoder(str(tmp_path), random_init=True)):
        with pytest.raises(InputError, match=f"config.json says {field} is 1000000000000; expected at most"):
            load()
    assert LARGEST_SIZE < 10**12


@pytest.mark.parametrize(
    "content", ['{"version": "9.0", "model": {"type": "Unknown"}}', "[" * 100_000, "[]", "7", '{"model": null}']
)
def test_tokenizer_file_of_another_version_is_one_line(content: str, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"\Ano tokenizer in '.*': .+\Z"):
        load_tokenizer(str(tmp_path))


def test_settings_nested_past_all_measure_are_one_line(folders: dict[str, str], tokenizer: Any, tmp_path: Path) -> None:
    student, former = StudentModel(folders["bert"], 2), tmp_path / "former"
    save_former(student, tokenizer, former, {})
    (former / "classifier.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match=r"\A.*classifier\.json cannot be read: .+\Z"):
        load_classifier(str(former))
    save_classifier(student, tokenizer, tmp_path, {"labels": ["bully", "spam"]})
    (tmp_path / "config.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match=r"\A[^\n]+\Z"):
        load_classifier(str(tmp_path))

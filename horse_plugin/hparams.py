"""One YAML file for training and editing.

Keys keep EasyEdit's names, so that a MALMEN file becomes a HORSE file by changing ``alg_name``.
"""

import itertools
import reprlib
import types
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar

import yaml

from horse_plugin.assets import DEFAULT_MODEL, shipped_yamls
from horse_plugin.assets.default_model import resolve
from horse_plugin.errors import UsageError, did_you_mean, first_line
from horse_plugin.foreign import ADVICE
from horse_plugin.method.hypernetwork import COEFFICIENTS, NORMALIZERS
from horse_plugin.method.losses import LOSSES
from horse_plugin.method.spread import SPREADS
from horse_plugin.storage.files import file_name
from horse_plugin.storage.schema import read_text

# Keys of EasyEdit's MALMEN and MEND files that say how *its* trainer runs. HORSE does not read
# them; they are accepted, so that existing files load unchanged.
EASYEDIT_ONLY = frozenset(
    """debug dropout train_base no_grad_layers silent log_interval eval_log_interval final_eval
    early_stop_key eval_only save val_batch_size model_save_pt opt""".split()
)

# Keys that have a better name now, and the names that files may still use.
ALIASES = {"alg": "alg_name", "n_edits": "edits_per_step", "val_steps": "val_records"}

# The least value of a key.
AT_LEAST = dict.fromkeys(
    """rank n_blocks edits_per_step min_edits_per_step max_epochs max_iters val_interval val_records
        val_edits early_stop_patience batch_size editor_batch_size batch_tokens max_length
        preserve_tokens keep_tokens edit_sweeps train_sweeps edit_block""".split(),
    1,
) | dict.fromkeys(
    """edit_coef gen_coef loc_coef keep_coef spread_strength trunk_cache_gb trunk_disk_gb
        preserve_mix seed""".split(),
    0,
)
PATHS = "model_name tokenizer_name archive preserve trunk_dir results_dir stats_dir".split()
ABOVE_0 = """edit_memory_gb strength lr ridge edit_ridge max_drift meta_lr eta_meta_lr max_grad_norm
    preserve_rho residual_cap full_loss edit_step edit_holds""".split()
AT_MOST = dict.fromkeys(("preserve_mix", "preserve_rho", "edit_step", "edit_holds"), 1)
AT_MOST |= {"seed": 2**32 - 1}
# The methods that our engine runs, and the settings that make it run them.
METHODS = {
    "HORSE": {
        "spread": "orthogonal",
        "loc_loss": "ce",
        "edit_coef": 1.0,
        "keep_coef": 1.0,
        "keep_edits": True,
        "preserve": "shipped",
        "val_score": "kept",
    },
    "MALMEN": {
        "spread": "uniform",
        "loc_loss": "kl",
        "edit_coef": 0.0,
        "keep_coef": 0.0,
        "keep_edits": False,
        "preserve": "none",
        "val_score": "paper",
    },
}
# As the archive: edit without one, and the one for the default model that comes with the package.
UNTRAINED, SHIPPED = "untrained", "shipped"
# Where a run works, and no figure of it.
CHANGE_NO_FIGURE = ("stats_dir", "edit_memory_gb", "offload_keys", "shard_trunk")
# Settings that say where a run works, and from what files.
WHERE_IT_RUNS = """device model_parallel batch_size trunk_cache_gb trunk_disk_gb trunk_dir
    results_dir archive model_name tokenizer_name evaluation_type""".split()
# Settings that only a training reads.
OF_TRAINING = """edits_per_step min_edits_per_step max_epochs max_iters meta_lr eta_meta_lr
    decay_meta_lr train_sweeps train_lamda train_spread edit_coef gen_coef loc_coef loc_loss
    keep_coef keep_tokens max_grad_norm val_interval val_edits val_records val_score
    early_stop_patience""".split()
DTYPES = ("fp32", "bf16", "fp16")


@dataclass
class HORSEHyperParams:
    """Settings of one HORSE run; every key but ``model_name`` has a default.

    Raises:
        UsageError: from :meth:`from_hparams` or the constructor, naming the key and the file.
    """

    # The model.
    model_name: str
    alg_name: str = "HORSE"
    model_class: str = "AutoModelForCausalLM"  # these two are read by EasyEdit's data sets
    tokenizer_class: str = "AutoTokenizer"
    tokenizer_name: str | None = None  # null: the model's own
    device: int | str | None = None  # null: the GPU if there is one
    model_parallel: bool = False  # spread one model over several devices
    shard_trunk: bool = False  # share out the blocks below the edited ones over all processes
    trunk_bits: int | None = None  # 4: bitsandbytes quantises the blocks below the edited ones
    half: bool | None = None  # true: bf16, false: fp32, null: what the hardware does best
    dtype: str | None = None  # fp32, bf16 or fp16; overrides `half`
    trust_remote_code: bool = False
    inner_params: list[str] = field(default_factory=list)  # empty: found (Sec. 2.1)
    archive: str | None = None  # folder of a trained hypernetwork, "untrained", or "shipped"

    # The method.
    rank: int = 256  # of A and B in the hypernetwork (Sec. 2.3)
    n_blocks: int = 2
    strength: float = 0.15  # mean row norm of R over that of the module's output: sets eta
    lr: float | None = None  # absolute eta (Eq. 4); given, it replaces `strength`
    ridge: float | None = None  # e^lambda (Eq. 2) at the start, over a typical key's squared norm;
    # null: e^lambda starts at 1
    edit_sweeps: int = 1  # most times that keys and gradients are read, each time in the model with
    # what the residuals so far write; 1: the paper's single step
    train_sweeps: int | None = None  # ... in a training step; null: edit_sweeps
    edit_holds: float | None = None  # the probability of an answer's token from which on sweeps of
    # an edit ask for no more; null: 0.9
    edit_step: float | None = None  # share of its residual that a row gets in a sweep of an edit
    # of several; null: 1, or less where keys crowd
    keep_next: bool = False  # sweeps also keep likely what followed an answer before the edit
    keep_edits: bool | None = None  # an edit on top of others is one of all facts then in force;
    # MALMEN false
    edit_block: int = 8192  # prompts whose keys are in memory at once; a larger edit sums them up
    # block by block
    residual_cap: float | None = None  # greatest row norm of R over the mean one of the module's
    # output; null: none
    full_loss: float | None = None  # nats from which on a token's row of R has its full length; it
    # shrinks in proportion below; null: it never shrinks
    normalizer: str = "feature"  # what the network reads: each feature standardised, or all keys
    # and all gradients divided by one number each (scale)
    edit_ridge: float = 1.0  # share of e^lambda that an edit takes; a training step takes all of it
    max_drift: float | None = None  # most KL(unedited || edited) on ordinary text, nats a token: an
    # edit takes a larger ridge term where it must; null: no limit
    # c_i (Eq. 4); for ablation edit_only: not in Eq. 7, none: c_i = -eta
    coefficient: str = "token"
    spread: str | None = None  # orthogonal (Eq. 6), gram_schmidt, released, uniform, decay (Eq. 5)
    spread_strength: float = 1.0  # 1: Eq. 6 as printed, 0: no projection
    token: str = "ans"  # where keys and gradients are read: at the answer tokens, or at the last
    # token of the subject (subject), in blocks that inner_params names

    # How the model is asked.
    separator: str | None = None  # between prompt and answer; null: a space between words
    chat_template: bool = False  # prompts are a user's turns in the tokenizer's chat template
    system_prompt: str | None = None  # of that chat; null: the template's own
    append_eos: bool = False  # the tokenizer's EOS token ends each answer
    evaluation_type: str | None = None  # generate-text or LLM-judge: EasyEdit measures, and so does
    # `horse eval`, what the model writes

    # What an edit leaves alone: the metric of the ridge term.
    preserve: str | None = None  # ordinary text: shipped, model (the model writes it), a file or a
    # hub data set; none: the paper's ridge term (MALMEN)
    preserve_tokens: int = 16384  # of that text, and of the training records' unrelated prompts
    preserve_mix: float = 0.5  # share of these prompts in the metric, where there are any
    preserve_rho: float = 0.01  # share of directions that ordinary text does not use

    # Training (Eq. 7).
    edits_per_step: int = 500  # records edited in one training step, or at most (alias: n_edits)
    min_edits_per_step: int | None = None  # sizes of steps are drawn log-uniformly from here to
    # edits_per_step; null: all steps have edits_per_step
    max_epochs: int = 1
    max_iters: int | None = None  # an upper limit on the steps of all epochs
    meta_lr: float = 1e-3  # Adam, for the network
    eta_meta_lr: float = 1e-2  # Adam, for log(eta) and lambda (and the spread, if trained)
    decay_meta_lr: bool = False  # let both rates sink linearly to 0 over the run
    train_lamda: bool = True  # false: the ridge term stays as it starts
    train_spread: bool = False  # let training move spread_strength
    edit_coef: float | None = None  # weight of the loss on the edit prompts; null: 1, MALMEN 0
    gen_coef: float = 1.0  # ... on the rephrased prompts
    loc_coef: float = 1.0  # ... on the unrelated prompts
    loc_loss: str | None = None  # ce: their true answer (HORSE); kl: what the model said (MALMEN)
    keep_coef: float | None = None  # weight of KL(unedited || edited) on ordinary text; MALMEN 0
    keep_tokens: int = 512  # of the preserved text in one step
    max_grad_norm: float = 1.0
    val_interval: int = 10  # steps between two validations
    val_edits: int | None = None  # records edited at once in a validation; null: edits_per_step
    val_records: int | None = None  # records in a validation (alias: val_steps); null: val_edits
    # Chooses the archive. kept: mean of the three figures, locality and 100·e^−drift (HORSE);
    # paper: mean of the three figures (MALMEN).
    val_score: str | None = None
    early_stop_patience: int | None = None  # steps without a better score
    seed: int = 0

    # Running.
    batch_size: int = 1000  # requests that EasyEdit's batch_edit hands over at once
    editor_batch_size: int = 8192  # answer tokens in one pass of the hypernetwork
    network_tf32: bool = False  # let GPUs multiply in TF32 in the hypernetwork: faster, less exact
    batch_tokens: int = 4096  # padded tokens in one pass of the model
    max_length: int = 4096  # longest prompt + answer in tokens; the model's limit holds too
    edit_memory_gb: float | None = None  # most memory that an edit or a training step may take, in
    # 10⁹ bytes, beside the model and a pass of it, by an estimate before; null: what is free
    offload_keys: bool = False  # keys and gradients wait in the memory of the CPU
    trunk_cache_gb: float = 2.0  # memory for trunk states kept between steps
    trunk_disk_gb: float = 0.0  # room for more of them in memory-mapped files
    trunk_dir: str | None = None  # folder of those files; null: the system's temporary one
    results_dir: str = "./results"
    stats_dir: str = "./stats"  # second moments are kept here, as EasyEdit's MEMIT keeps its own

    source: ClassVar[Path | None] = None  # the YAML it was read from

    def __post_init__(self):
        for key in PATHS:
            if str(getattr(self, key)).startswith("~"):
                try:
                    setattr(self, key, str(Path(getattr(self, key)).expanduser()))
                except RuntimeError:
                    raise UsageError(f"{key}: {getattr(self, key)}: no such user.") from None
        for f in fields(self):
            setattr(self, f.name, _checked(f.name, getattr(self, f.name), f.type))
        if self.preserve == "none" and self.keep_coef is None:
            self.keep_coef = 0.0
        for key, value in METHODS.get(self.alg_name, {}).items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        for key, allowed in (
            ("alg_name", tuple(METHODS)),
            ("coefficient", COEFFICIENTS),
            ("normalizer", NORMALIZERS),
            ("spread", tuple(SPREADS)),
            ("loc_loss", tuple(LOSSES)),
            ("val_score", ("kept", "paper")),
            ("dtype", (None, *DTYPES)),
            ("trunk_bits", (None, 4)),
            ("token", ("ans", "subject")),
            ("evaluation_type", (None, "generate-text", "LLM-judge")),
        ):
            if getattr(self, key) not in allowed:
                names = ", ".join(str(a) for a in allowed if a)
                raise UsageError(f"{key}: {getattr(self, key)!r} is not one of {names}.")
        for key, least in AT_LEAST.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise UsageError(f"{key}: must be at least {least}, got {value}.")
        for key in ABOVE_0:
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise UsageError(f"{key}: must be above 0, got {value}.")
        for key, most in AT_MOST.items():
            value = getattr(self, key)
            if value is not None and value > most:
                raise UsageError(f"{key}: must be at most {most}, got {value}.")
        if (self.min_edits_per_step or 1) > self.edits_per_step:
            raise UsageError(
                f"min_edits_per_step: must be at most edits_per_step, {self.edits_per_step}, got "
                f"{self.min_edits_per_step}. Lower it, or set it to null."
            )
        if self.system_prompt is not None and not self.chat_template:
            raise UsageError(
                "system_prompt: without a chat nothing says it. Set chat_template: true, or leave "
                "system_prompt out."
            )
        if not self.edit_coef + self.gen_coef > 0:
            raise UsageError("edit_coef and gen_coef are both 0: nothing would teach the edit.")

    @classmethod
    def from_hparams(cls, path) -> "HORSEHyperParams":
        """Return the settings of a YAML file.

        Args:
            path: the file, with or without ``.yaml``, or the name of a shipped one, such as
                ``llama2-7b`` or ``MALMEN/llama-smollm2-135m``.
        """
        path = find_yaml(path)
        keys = read_keys(path)
        try:
            made = cls.from_dict(keys)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        made.source = path
        return made

    @classmethod
    def from_dict(cls, keys: dict) -> "HORSEHyperParams":
        """Return the settings of plain keys, aliases among them."""
        keys = canonical(keys)
        known = {f.name for f in fields(cls)}
        for key in list(keys):
            if key in EASYEDIT_ONLY:
                del keys[key]
            elif key not in known:
                if advice := ADVICE.get(key):
                    raise UsageError(f"{key!r} is no key of ours. {advice}.")
                near = did_you_mean(str(key), sorted(known | ALIASES.keys()))
                hint = near or " See hparams/HORSE for the keys."
                raise UsageError(f"unknown key {reprlib.repr(key)}.{hint}")
        if "model_name" not in keys:
            raise UsageError("model_name is missing: name a model folder or hub id.")
        if keys.get("token") == "mask":  # MALMEN's files; HORSE has no such token
            del keys["token"]
        return cls(**keys)

    def to_dict(self) -> dict:
        return asdict(self)

    def in_steps_of(self, n: int) -> "HORSEHyperParams":
        """Return the settings with n records in each training step, whatever sizes they had."""
        return replace(self, edits_per_step=n, min_edits_per_step=None)

    @property
    def archive_folder(self) -> Path:
        """The folder of the archive, unless training is told another."""
        return Path(
            self.results_dir, "models", self.alg_name, file_name(Path(self.model_name).name)
        )

    @property
    def model(self) -> types.SimpleNamespace:
        """EasyEdit's data sets look for the tokenizer at ``config.model.name``."""
        return types.SimpleNamespace(name=resolve(self.model_name))


def find_yaml(path) -> Path:
    """Return the YAML file of that path, which may leave out ``.yaml``, or the shipped one.

    A shipped file is found by its name, and by its path in a checkout wherever there is none:
    ``llama2-7b``, ``HORSE/llama2-7b`` and ``hparams/HORSE/llama2-7b``.

    Raises:
        UsageError: there is no such file; the message names the nearest shipped one.
    """
    path = Path(path).expanduser()
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        path = Path(f"{path}.yaml")
    if path.is_file():
        return path
    shipped = shipped_yamls()
    name = path.with_suffix("").as_posix().removeprefix("hparams/")
    if name in shipped:
        return shipped[name]
    hint = did_you_mean(name, shipped) or " `horse init MODEL` writes one."
    raise UsageError(f"{path}: no such hparams file.{hint}")


def read_keys(path: Path) -> dict:
    """Return the keys of a YAML file.

    Raises:
        UsageError: there is no such file, or it is no YAML of keys, or one that unfolds to more
            values than settings have.
    """
    try:
        keys = yaml.safe_load(read_text(path))
        _check_size(keys)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such hparams file.") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not a readable YAML file ({first_line(error)}).") from None
    if not isinstance(keys, dict):
        raise UsageError(f"{path}: expected `key: value` lines, found {type(keys).__name__}.")
    return keys


def _check_size(keys):
    """Refuse what names of parts (``&a``, ``*a``) unfold to, which a few lines make endless."""
    left, level, depth = 10_000, [keys], 0
    while level and (depth := depth + 1):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list, tuple))
            for inner in itertools.islice(_inside(value), left + 1)
        ]
        left -= len(level)
        if left < 0 or depth > 20:
            raise ValueError("more than 10,000 values, or more than 20 one in another")


def _inside(value):
    return itertools.chain(value.keys(), value.values()) if isinstance(value, dict) else value


def _attribute(name: str) -> property:
    return property(lambda hp: getattr(hp, name), lambda hp, value: setattr(hp, name, value))


for _alias, _name in ALIASES.items():  # as attributes, too
    setattr(HORSEHyperParams, _alias, _attribute(_name))


def default_hparams() -> HORSEHyperParams:
    """Return the shipped settings for the default model."""
    return HORSEHyperParams.from_hparams(shipped_yamls()[DEFAULT_MODEL])


def canonical(keys: dict) -> dict:
    """Return the keys by their present names; a present name wins over its alias."""
    renamed = {ALIASES[key]: value for key, value in keys.items() if key in ALIASES}
    return renamed | {key: value for key, value in keys.items() if key not in ALIASES}


def _checked(name, value, annotation):
    """Return the value as the annotated type.

    Raises:
        UsageError: it is of another type; the message says what was expected.
    """
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    for kind in options:
        origin = typing.get_origin(kind) or kind
        if origin is types.NoneType:
            if value is None:
                return None
        elif origin is bool or isinstance(value, bool):
            if origin is bool and isinstance(value, bool):
                return value
        elif origin is float:
            number = _number(value)
            if number is not None:
                return number
        elif origin is int:
            number = value if isinstance(value, int) else None
            if number is None and (found := _number(value)) is not None and found.is_integer():
                number = int(found)
            if number is not None and not (isinstance(value, str) and str in options):
                return number
        elif origin is list:
            if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
                return list(value)
            if value is None:
                return []
        elif isinstance(value, origin):
            return value
    expected = " or ".join(_NAMES.get(typing.get_origin(k) or k, str(k)) for k in options)
    raise UsageError(f"{name}: expected {expected}, got {reprlib.repr(value)}.")


_NAMES = {
    bool: "true/false",
    float: "a number",
    int: "a whole number",
    str: "text",
    list: "a list of names",
    types.NoneType: "null",
}


def _is_union(annotation) -> bool:
    return typing.get_origin(annotation) in (types.UnionType, typing.Union)


def _number(value) -> float | None:
    """Return a finite number or None. YAML reads ``1e-5``, common in EasyEdit's files, as text."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number - number == 0 else None

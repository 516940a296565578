"""The model cut in two equals the model, for every architecture; edits come off bit for bit."""

import contextlib
import gc
import weakref

import accelerate
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from horse_plugin import HorseEditor
from horse_plugin.data.batches import batches
from horse_plugin.data.prompts import Prompt
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import capture
from horse_plugin.model.halves import UNFUSED
from horse_plugin.model.loading import dtype_of, resolve_device
from horse_plugin.model.weights import copied_to_host
from tests import tiny

MIDDLE = [f"model.layers.{i}.mlp.down_proj" for i in (3, 4)]


def prompts(n=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        ids = torch.randint(3, 300, (4 + 2 * i,), generator=generator).tolist()
        made.append(Prompt(tuple(ids), len(ids) - 1 - i % 3))
    return made


def full_logits(model, prompt):
    """The plain forward pass on one prompt, at its answer positions."""
    logits = model(torch.tensor([prompt.inputs])).logits[0]
    return logits[prompt.start - 1 :]


@pytest.mark.parametrize("architecture", sorted(tiny.CONFIGS))
@torch.no_grad()
def test_trunk_and_top_give_the_full_models_logits(architecture):
    model = tiny.model(architecture)
    want = {p: full_logits(model, p) for p in prompts()}
    backbone = Backbone(model, None, batch_tokens=40, trunk_cache_gb=0.1)
    for keep in ([], prompts()[:4], prompts()):  # computed, some kept, all kept
        backbone.cache_trunk_states(keep)
        for batch in batches(prompts(), 40):
            got = backbone.logits(batch).split([len(p.answer) for p in batch.prompts])
            for p, logits in zip(batch.prompts, got, strict=True):
                torch.testing.assert_close(logits, want[p], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("architecture", sorted(tiny.CONFIGS))
def test_edit_modules_are_the_second_projections_of_the_last_six_blocks(architecture):
    name = tiny.SECOND_PROJECTION.get(architecture, "model.layers.{}.mlp.down_proj")
    backbone = Backbone(tiny.model(architecture), None)
    assert list(backbone.modules) == [name.format(i) for i in range(2, 8)]
    d, d_out = backbone.shapes[0]
    assert d_out == 32 and d in (48, 128)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptj", "gpt-neox"])
def test_the_capture_gives_inputs_and_gradients_at_the_answers(architecture):
    """Against hooks on the plain forward pass, prompt by prompt."""
    model = tiny.model(architecture).requires_grad_(False)
    backbone = Backbone(model, None, batch_tokens=40)
    captured = capture(backbone, prompts())
    row = 0
    for p in prompts():
        seen = {}

        def hook(module, args, out, seen=seen):
            out = out + 0 if out.requires_grad else out.detach().requires_grad_()
            out.retain_grad()
            seen[module] = args[0], out
            return out

        hooks = [m.register_forward_hook(hook) for m in backbone.modules.values()]
        logits = full_logits(model, p)
        torch.nn.functional.cross_entropy(
            logits, torch.tensor(p.answer), reduction="sum"
        ).backward()
        for h in hooks:
            h.remove()
        n = len(p.answer)
        for l, module in enumerate(backbone.modules.values()):
            keys, out = seen[module]
            torch.testing.assert_close(
                captured.keys[l][row : row + n], keys[0, p.start - 1 :].detach()
            )
            torch.testing.assert_close(
                captured.grads[l][row : row + n], out.grad[0, p.start - 1 :], atol=1e-5, rtol=1e-4
            )
        row += n
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_restore_is_bit_exact(architecture, dtype):
    backbone = Backbone(tiny.model(architecture, dtype), None)
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    shifts = {n: torch.randn(s) for n, s in zip(backbone.modules, backbone.shapes, strict=True)}
    saved = backbone.weights.add(shifts)
    assert not torch.equal(
        before[f"{next(iter(shifts))}.weight"], next(iter(backbone.modules.values())).weight
    )
    backbone.weights.restore(saved)
    for k, v in backbone.model.state_dict().items():
        assert torch.equal(v, before[k]), k


def test_a_failure_half_way_leaves_every_weight_as_it_was():
    backbone = Backbone(tiny.model(), None)
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    shifts = {n: torch.randn(s) for n, s in zip(backbone.modules, backbone.shapes, strict=True)}
    shifts[list(shifts)[3]] = torch.randn(2, 2)  # does not fit
    with pytest.raises(HorseError, match="the shift is"):
        backbone.weights.add(shifts)
    for k, v in backbone.model.state_dict().items():
        assert torch.equal(v, before[k]), k


class OfAGPU:
    """What a copy to the host asks of a tensor of a GPU."""

    device, shape, dtype = torch.device("cuda", 1), (2,), torch.float32


@pytest.mark.parametrize("fails", [False, True])
def test_a_gpu_copies_in_a_stream_of_its_own_and_is_waited_for_at_the_end(fails, monkeypatch):
    asked = []

    class Stream:
        def __init__(self, device):
            asked.append(f"stream on {device}")

        def wait_stream(self, other):
            asked.append(f"after {other}")

        def synchronize(self):
            asked.append("waited")

    class Host:
        def copy_(self, source, non_blocking):
            asked.append(f"copy, non_blocking={non_blocking}")
            return self

    def pinned(shape, dtype, pin_memory):
        assert (shape, dtype, pin_memory) == (OfAGPU.shape, OfAGPU.dtype, True)
        return Host()

    @contextlib.contextmanager
    def inside(stream):
        asked.append("in it")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the work of {device}")
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch, "empty", pinned)
    here = torch.ones(2)
    tensors = {"a": OfAGPU(), "here": here, "b": OfAGPU()}
    with contextlib.suppress(HorseError), copied_to_host(tensors) as found:
        assert list(found) == ["a", "here", "b"] and torch.equal(found["here"], here)
        asked.append("work")
        if fails:
            raise HorseError("while it copies")
    copy = ["in it", "copy, non_blocking=True"]
    begun = ["stream on cuda:1", "after the work of cuda:1"]
    assert asked == [*begun, *copy, *copy, "work", "waited"]


def test_a_backbone_that_is_dropped_is_gone_at_once():
    """In a circle, an edited model of gigabytes would wait for the garbage collector."""
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer(), trunk_cache_gb=0.1)
    backbone.cache_trunk_states(prompts())
    capture(backbone, prompts())
    found = weakref.ref(backbone)
    gc.collect()
    gc.disable()
    try:
        del backbone
        assert found() is None
    finally:
        gc.enable()


def test_no_hook_and_no_patch_stays_behind():
    backbone = Backbone(tiny.model(), None)
    list(map(backbone.logits, batches(prompts(), 40)))
    batch = next(batches(prompts(), 400))
    with pytest.raises(RuntimeError):  # states that do not fit their batch
        backbone.top(batch, torch.zeros(1, 1, 32))
    for m in backbone.model.modules():
        assert not m._forward_hooks and not m._forward_pre_hooks
        assert "forward" not in m.__dict__


class LargestTensor(TorchDispatchMode):
    """Note the largest number of entries of a tensor that torch returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t):
                self.entries = max(self.entries, t.numel())
        return out


@pytest.mark.parametrize(("n", "has_scores"), [(UNFUSED, True), (UNFUSED + 44, False)])
def test_long_sequences_keep_no_score_for_each_pair_of_tokens(n, has_scores):
    config = tiny.CONFIGS["llama"]()
    config.max_position_embeddings = 2 * UNFUSED
    backbone = Backbone(transformers.AutoModelForCausalLM.from_config(config), None)
    with LargestTensor() as largest:
        capture(backbone, [Prompt(tuple(range(5, 5 + n)), n - 2)])
    assert (largest.entries >= config.num_attention_heads * (n - 1) ** 2) == has_scores


@pytest.mark.parametrize("architecture", sorted(tiny.CONFIGS))
def test_the_last_mlp_works_at_the_answers_alone(architecture):
    backbone = Backbone(tiny.model(architecture), None)
    seen = []
    *_, last = backbone.modules.values()
    last.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    for batch in batches(prompts(), 40):
        backbone.logits(batch)
        assert seen.pop() == len(batch.labels) < batch.ids.numel()


def test_the_last_block_alone_may_be_edited():
    model = tiny.model()
    names = ["model.layers.7.mlp.gate_proj", "model.layers.7.mlp.down_proj"]
    captured = capture(Backbone(model, None, names, batch_tokens=40), prompts())
    every = capture(Backbone(model, None, batch_tokens=40), prompts())
    torch.testing.assert_close(captured.keys[1], every.keys[-1])
    torch.testing.assert_close(captured.grads[1], every.grads[-1])
    assert captured.keys[0].shape == captured.grads[1].shape == (len(captured.record_of_row), 32)


def test_named_modules_may_be_few_and_anywhere():
    names = ["model.layers.5.mlp.down_proj.weight", "model.layers.2.mlp.up_proj"]
    backbone = Backbone(tiny.model(), None, names)
    assert list(backbone.modules) == ["model.layers.2.mlp.up_proj", "model.layers.5.mlp.down_proj"]
    assert backbone.shapes == [(32, 48), (48, 32)]


def test_editing_the_first_block_leaves_no_trunk():
    model = tiny.model()
    backbone = Backbone(model, None, ["model.layers.0.mlp.down_proj"])
    p = prompts()[3]
    got = backbone.logits(next(batches([p], 99)))
    torch.testing.assert_close(got, full_logits(model, p), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.99.mlp.down_proj", "no module"),
        ("model.layers.1.mlp", "not a linear map"),
        ("lm_head", "does not lie in a block"),
    ],
)
def test_a_module_that_cannot_be_edited_is_named(name, says):
    with pytest.raises(UsageError, match=says):
        Backbone(tiny.model(), None, [name])


def test_a_dispatched_model_gives_the_same_edit():
    """``device_map="auto"`` wraps every block's forward; the taps must live with that."""
    logits = []
    for dispatched in (False, True):
        model = tiny.model()
        if dispatched:
            places = {name: "cpu" for name, _ in model.named_children()}
            places |= {f"model.layers.{i}": "cpu" for i in range(8)}
            places |= {f"model.{n}": "cpu" for n in ("embed_tokens", "norm", "rotary_emb")}
            del places["model"]
            accelerate.dispatch_model(model, places, force_hooks=True)
            assert "forward" in model.model.layers[0].__dict__
        editor = HorseEditor(model, tiny.bpe_tokenizer(), tiny.hparams())
        editor.edit(tiny.records())
        logits.append(editor.backbone.logits(next(batches(prompts(), 400))))
        assert ("forward" in model.model.layers[0].__dict__) == dispatched
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_dtype_asked_for_is_loaded(tmp_path, dtype):
    tiny.model().save_pretrained(tmp_path)
    tiny.bpe_tokenizer().save_pretrained(tmp_path)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    backbone = Backbone.load(tiny.hparams(model_name=str(tmp_path), dtype=dtype))
    assert backbone.model.dtype is wanted
    assert backbone.edit_dtype is torch.float32


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_cpu_computes_in_bf16_where_it_has_it_and_torch_may_use_it(
    monkeypatch, capability, has_bf16
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    found = dtype_of(tiny.hparams(dtype=None), torch.device("cpu"))
    assert found == (torch.bfloat16 if has_bf16 and capability == "AVX512" else torch.float32)


@pytest.mark.parametrize("device", [None, "cpu", "auto"])
def test_devices_without_a_gpu(device):
    wanted = "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"
    assert resolve_device(device).type == wanted


@pytest.mark.parametrize("device", [0, "0", "cuda:0", "nonsense"])
def test_a_device_that_is_not_there_is_named(device):
    if torch.cuda.is_available() and device != "nonsense":
        assert resolve_device(device) == torch.device("cuda:0")
    else:
        with pytest.raises(UsageError, match="device: "):
            resolve_device(device)


def test_a_device_without_float64_is_refused():
    with pytest.raises(UsageError, match="device: 'mps' has no float64"):
        resolve_device("mps")


def test_keys_and_gradients_stay_in_the_dtype_of_their_module():
    """Half the memory, and the same bits as in float32."""
    hparams, edits = tiny.hparams(strength=5.0), []
    for own in (True, False):
        editor = HorseEditor(tiny.model("llama", torch.bfloat16), tiny.bpe_tokenizer(), hparams)
        captured = editor.capture(tiny.records())
        assert {t.dtype for t in captured.keys + captured.grads} == {torch.bfloat16}
        if not own:
            captured.keys = [h.float() for h in captured.keys]
            captured.grads = [g.float() for g in captured.grads]
        edits.append(editor.edit(tiny.records(), captured=captured).tensors)
    for name, tensor in edits[0].items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, edits[1][name])


def test_keys_are_read_where_the_subject_ends():
    """With ``token: subject`` the first answer token is predicted from the subject's last one."""
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer(), MIDDLE, token="subject")
    records = tiny.records()
    prompts = backbone.prepare(records, ["edit"]).flat()
    captured = capture(backbone, prompts)
    name, rows = MIDDLE[0], captured.keys[0].split([len(p.answer) for p in prompts])
    assert {len(p.answer) for p in prompts} > {1}
    for record, prompt, found in zip(records, prompts, rows, strict=True):
        before = backbone.tokenizer(f"the capital of {record.subject}")["input_ids"]
        keys = []
        hook = backbone.modules[name].register_forward_pre_hook(
            lambda module, args, keys=keys: keys.append(args[0][0])
        )
        backbone.model(torch.tensor([prompt.inputs]))
        hook.remove()
        wanted = [keys[0][len(before) - 1], *keys[0][prompt.start :]]
        torch.testing.assert_close(found, torch.stack(wanted).detach())
    HorseEditor.from_backbone(backbone, tiny.hparams(token="subject")).edit(records)


def test_a_subject_must_be_read_below_the_last_block():
    model = tiny.model()
    found = Backbone(model, tiny.bpe_tokenizer(), token="subject")
    assert list(found.modules) == ["model.layers.6.mlp.down_proj"]  # of 8 blocks
    last = Backbone(model, tiny.bpe_tokenizer(), ["model.layers.7.mlp.down_proj"], token="subject")
    with pytest.raises(UsageError, match="in the last block"):
        capture(last, last.prepare(tiny.records(), ["edit"]).flat())

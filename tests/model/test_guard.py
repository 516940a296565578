"""The caller's model: held by one thread at a time, and given back as it was handed over."""

import contextlib
import re
import threading
import warnings

import peft
import pytest
import torch

from horse_plugin import Evaluator, HorseEditor, HorseError, HORSETrainer, UsageError
from horse_plugin.data.batches import batches
from horse_plugin.evaluation.drift import OrdinaryText
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import capture
from horse_plugin.model.guard import guard, none_packed
from tests import ROOT, tiny
from tests.fast import fast

IDS = torch.arange(5, 25)[None]


def editor(model=None, **changes):
    model = tiny.model() if model is None else model
    return HorseEditor(model, tiny.bpe_tokenizer(), tiny.hparams(**changes))


def used_model():
    """A model in the middle of its caller's own fine-tuning."""
    model = tiny.model().train()
    model.model.layers[3].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[7].mlp.down_proj.register_forward_hook(lambda module, args, out: out + 0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return model


def state_of(model):
    """All that a caller may have set on a model, but for the values of its weights."""
    modules = [
        (m.training, "forward" in vars(m), *map(dict, (m._forward_hooks, m._forward_pre_hooks)))
        for m in model.modules()
    ]
    parameters = [
        (id(p), p.requires_grad, id(p.grad), None if p.grad is None else p.grad.sum().item())
        for p in model.parameters()
    ]
    return modules, parameters


def trainer(backbone, folder):
    hparams = tiny.hparams(edits_per_step=6, max_iters=2, max_epochs=2, val_interval=1)
    records = tiny.records(18)
    return HORSETrainer(hparams, records[:12], records[12:], folder, backbone, progress=False)


def edited(backbone, folder):
    e = HorseEditor.from_backbone(backbone, tiny.hparams())
    delta = e.edit(tiny.records())
    assert Evaluator(backbone, tiny.records(), writing=True).evaluate().examples
    e.undo()
    e.apply(delta)


WORK = {
    "edit, evaluate, undo, apply": edited,
    "train": lambda backbone, folder: trainer(backbone, folder).run(),
    "ordinary text": lambda b, _: OrdinaryText(b, [("text", tiny.words(0, 20))]).measure(),
}


@pytest.mark.parametrize("work", WORK)
def test_a_callers_model_comes_back_as_it_was(tmp_path, work):
    model = used_model()
    before, random = state_of(model), torch.get_rng_state()
    WORK[work](Backbone.of(model, tiny.bpe_tokenizer(), tiny.hparams()), tmp_path)
    assert state_of(model) == before
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("at", fast(range(0, 40, 3), range(0, 40, 12)))
def test_after_any_exception_too(at, error):
    """Raised in the middle of a pass, forward, backward, in the trunk or in the top."""
    model, calls = used_model(), iter(range(at))

    def interrupt(*args):
        if next(calls, None) is None:
            raise error

    for block in model.model.layers[::3]:
        block.register_forward_hook(interrupt)
    model.model.layers[6].register_full_backward_hook(interrupt)
    before = state_of(model)
    with contextlib.suppress(error):
        editor(model).edit(tiny.records())
    assert state_of(model) == before
    for module in model.modules():
        module._forward_hooks.clear(), module._backward_hooks.clear()
    editor(model).edit(tiny.records())  # nobody holds the model


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def float32_products(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        assert torch.get_float32_matmul_precision() == precision
        torch.set_float32_matmul_precision("highest")


AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "anomaly mode": torch.autograd.detect_anomaly,
    "bf16 by default": lambda: default_dtype(torch.bfloat16),
    "fp64 by default": lambda: default_dtype(torch.float64),
    "a default device": lambda: torch.device("meta"),
    "TF32 products": lambda: float32_products("high"),
    "bf16 products": lambda: float32_products("medium"),
}


@pytest.fixture(scope="module")
def by_itself(tmp_path_factory):
    return bits_of_work(tmp_path_factory.mktemp("whole"), contextlib.nullcontext)


def bits_of_work(folder, around):
    """The weights after an edit, after two and an undo, and the network after training."""
    e, found = editor(), []

    def bits(module):
        return {name: t.clone() for name, t in module.state_dict().items()}

    with around(), warnings.catch_warnings(action="ignore"):
        first = e.edit(tiny.records(3), "first")
        found.append(bits(e.backbone.model))
        e.edit(tiny.records(6)[3:], "second")
        e.undo("first")
        found.append(bits(e.backbone.model))
        e.undo()
        e.apply(first)
        found.append(bits(e.backbone.model))
        t = trainer(Backbone.of(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams()), folder)
        t.run()
        found.append(bits(t.network))
    return found


def around_but_not_the_model(around, monkeypatch):
    """``tiny.model`` outside of what is around us: it belongs to the caller."""
    models = iter([tiny.model(), tiny.model()])
    monkeypatch.setattr(tiny, "model", lambda: next(models))
    return around


@pytest.mark.parametrize("name", fast(AROUND, ["autocast", "inference mode"]))
def test_what_the_caller_switched_on_changes_no_bit(tmp_path, monkeypatch, by_itself, name):
    found = bits_of_work(tmp_path, around_but_not_the_model(AROUND[name], monkeypatch))
    for one, other in zip(found, by_itself, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_callers_autocast_sees_the_edited_weights():
    """Autocast keeps the weights that it has cast, until its outermost ``with`` ends."""
    e = editor()
    with torch.autocast("cpu", torch.bfloat16):
        before = e.backbone.model(IDS).logits
        e.edit(tiny.records())
        after = e.backbone.model(IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, e.backbone.model(IDS).logits)
    assert not torch.equal(before, after)


def test_a_model_that_cannot_be_changed_is_refused():
    with torch.inference_mode():
        model = tiny.model()
    with pytest.raises(UsageError, match="loaded in inference mode"):
        editor(model)


def tie(model):
    model.model.layers[6].mlp.down_proj.weight = model.model.layers[7].mlp.down_proj.weight


def tie_memory(model):
    both = torch.randn(33, 48)
    for i, rows in ((4, both[:32]), (5, both[1:])):
        model.model.layers[i].mlp.down_proj.weight = torch.nn.Parameter(rows)


@pytest.mark.parametrize("share", [tie, tie_memory])
def test_two_edit_modules_that_share_memory_are_refused(share):
    model = tiny.model()
    share(model)
    with pytest.raises(UsageError, match=r"layers\.\d.*and .*share one weight. Name one of them"):
        editor(model)


def test_one_of_two_modules_that_share_a_weight_is_edited_and_undone_to_the_bit():
    model = tiny.model()
    tie(model)
    before = model.model.layers[6].mlp.down_proj.weight.clone()
    e = editor(model, inner_params=["model.layers.7.mlp.down_proj"], trunk_cache_gb=1)
    prompts = e.backbone.prepare(tiny.records()).flat()
    e.backbone.cache_trunk_states(prompts)
    unedited = logits_now(e.backbone, prompts)
    e.edit(tiny.records())
    edited = logits_now(e.backbone, prompts)
    fresh = Backbone(model, tiny.bpe_tokenizer(), list(e.backbone.modules))
    assert torch.equal(edited, logits_now(fresh, prompts)) and not torch.equal(edited, unedited)
    e.undo()
    assert torch.equal(before, model.model.layers[6].mlp.down_proj.weight)
    assert torch.equal(unedited, logits_now(e.backbone, prompts))


def test_a_weight_that_a_hook_computes_is_refused():
    model = tiny.model()
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model.model.layers[7].mlp.down_proj)
    with pytest.raises(UsageError, match=r"layers\.7\.mlp\.down_proj: its weight is no parameter"):
        editor(model)


def weight_of(model):
    return model.model.layers[0].self_attn.q_proj.weight


def assign(model):
    state = tiny.model(seed=1).state_dict()
    kept = {k: v for k, v in model.state_dict().items() if "layers.7" in k}
    model.load_state_dict(state | kept, assign=True)


CHANGES = {
    "other data": lambda m: setattr(weight_of(m), "data", weight_of(m).data * 2),
    "one entry of the data": lambda m: weight_of(m).data[3, 4].add_(1),
    "rows of the data": lambda m: m.model.embed_tokens.weight.data.copy_(
        m.model.embed_tokens.weight.data.flip(0)
    ),
    "another parameter": lambda m: setattr(
        m.model.layers[0].self_attn.q_proj, "weight", torch.nn.Parameter(weight_of(m) * 2)
    ),
    "load_state_dict": assign,
    "a hook": lambda m: m.model.layers[1].register_forward_hook(lambda b, args, out: out * 2),
}


def logits_now(backbone, prompts):
    return torch.cat([backbone.logits(batch) for batch in batches(prompts, 400)]).detach()


@pytest.mark.parametrize("name", CHANGES)
def test_trunk_states_are_of_this_model(name):
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer(), trunk_cache_gb=0.1)
    prompts = backbone.prepare(tiny.records()).flat()
    backbone.cache_trunk_states(prompts)
    before = logits_now(backbone, prompts)
    assert not backbone.trunk_cache.missing([p.inputs for p in prompts])
    CHANGES[name](backbone.model)
    fresh = Backbone(backbone.model, tiny.bpe_tokenizer())
    after = logits_now(backbone, prompts)
    assert torch.equal(after, logits_now(fresh, prompts)) and not torch.equal(before, after)


def test_trunk_states_are_of_this_adapter():
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.model(), config)
    backbone = Backbone(model, tiny.bpe_tokenizer(), trunk_cache_gb=0.1)
    prompts = backbone.prepare(tiny.records()).flat()
    backbone.cache_trunk_states(prompts)
    with_adapter = logits_now(backbone, prompts)
    with model.disable_adapter():
        without = logits_now(backbone, prompts)
        fresh = Backbone(model, tiny.bpe_tokenizer())
        assert torch.equal(without, logits_now(fresh, prompts))
    assert torch.equal(with_adapter, logits_now(backbone, prompts))
    assert not torch.equal(with_adapter, without)


def in_thread(work):
    """Start the work in a thread; return the thread, and a list that gets the outcome."""
    outcome = []

    def run():
        try:
            outcome.append(work())
        except HorseError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def test_another_thread_waits_for_the_model():
    """Be it a plain forward pass, one of ours, or an edit."""
    e = editor()
    model, other = e.backbone.model, editor(e.backbone.model)
    prompts = e.backbone.prepare(tiny.records()).flat("edit")
    with torch.no_grad():
        plain = model(IDS).logits
    works = [
        lambda: torch.no_grad()(model)(IDS).logits,
        lambda: capture(other.backbone, prompts),
        lambda: other.edit(tiny.records(2)),
    ]
    with guard(model):
        threads = [in_thread(work) for work in works]
        delta = e.edit(tiny.records())
        for thread, outcome in threads:
            thread.join(0.2)
            assert thread.is_alive() and not outcome
        e.undo()
    for thread, _ in threads:
        thread.join(60)
    (logits,), (captured,), (edited,) = (outcome for _, outcome in threads)
    assert captured.keys and len(edited.records) == 2
    assert len(delta.records) == 6 and logits.shape == plain.shape


def test_an_edit_by_another_thread_is_noticed():
    e = editor()
    e.edit(tiny.records())
    thread, _ = in_thread(lambda: editor(e.backbone.model).edit(tiny.records(2)))
    thread.join(60)
    with pytest.raises(HorseError, match="changed by others"):
        e.edit(tiny.records())


def test_a_pass_that_another_thread_had_begun_runs_all_its_blocks():
    """Ours skips the trunk's blocks, and keeps the answers only, in our thread alone."""
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer(), trunk_cache_gb=0.1)
    prompts = backbone.prepare(tiny.records()).flat("edit")
    backbone.cache_trunk_states(prompts)
    with torch.no_grad():
        wanted = backbone.model(IDS).logits
    begun, go_on = threading.Event(), threading.Event()

    def pause(block, args, out):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(60)

    first = backbone.blocks[0].register_forward_hook(pause)
    thread, outcome = in_thread(lambda: torch.no_grad()(backbone.model)(IDS).logits)
    assert begun.wait(60)

    def let_go(*args):
        go_on.set()
        thread.join(60)

    hook = backbone.blocks[-1].register_forward_pre_hook(
        lambda *args: let_go() if threading.current_thread() is threading.main_thread() else None
    )
    backbone.logits(next(batches(prompts, 400)))
    first.remove(), hook.remove()
    torch.testing.assert_close(outcome[0], wanted)


def test_packed_sequences_of_a_caller_are_told_apart_while_we_pack_none():
    """The library is asked to look for them in all passes but ours."""
    model, positions, found = tiny.model(), torch.arange(5).repeat(2)[None], []
    ids = torch.cat([IDS[:, :5], IDS[:, 5:10]], 1)
    alone = torch.cat([model(part).logits for part in ids.split(5, 1)], 1)

    def packed():
        found.append(
            (model(ids, position_ids=positions, use_cache=False).logits - alone).abs().max()
        )

    with none_packed.in_this_thread():
        thread = threading.Thread(target=packed)
        thread.start()
        thread.join()
        packed()
    packed()
    assert found[0] < 1e-5 and found[1] > 1e-3 and found[2] < 1e-5


def test_a_copy_is_edited_while_the_model_answers():
    """The example of ``docs/editing.md``."""
    text = (ROOT / "docs/editing.md").read_text()
    (example,) = re.findall(r"```py\n(.*?)```", text, flags=re.S)
    model = tiny.model()
    wanted = editor().edit(tiny.records())
    names = {"HorseEditor": HorseEditor, "tokenizer": tiny.bpe_tokenizer(), "serving": model}
    names |= {"hparams": tiny.hparams(), "records": tiny.records()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stop, answers = threading.Event(), []

    def serve():
        while not stop.is_set() or not answers:
            answers.append(torch.no_grad()(model)(IDS).logits)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        exec(example, names)
    finally:
        stop.set()
        thread.join(60)
    for answer in answers:  # the kernel of attention is a setting of the whole process
        torch.testing.assert_close(answer, answers[0])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    fresh = editor()
    fresh.apply(wanted)
    edited, fresh = names["serving"].state_dict(), fresh.backbone.model.state_dict()
    assert all(torch.equal(edited[k], fresh[k]) for k in fresh)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_of_float32_are_exact_inside_the_guard(precision):
    of_products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    with float32_products(precision):
        before = [products.fp32_precision for products in of_products]
        assert "ieee" not in before
        with backbone.held():
            assert [products.fp32_precision for products in of_products] == ["ieee", "ieee"]
        assert [products.fp32_precision for products in of_products] == before

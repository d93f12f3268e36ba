"""The programs that a plan compiles, on simulated devices in place of a slice."""

import dataclasses

import jax
import pytest

import grok
from grok import hardware
from grok.config import LoraConfig, PlanConfig
from grok.config.load import load_config
from grok.errors import ConfigError
from grok.infer.step import forward_and_sample
from grok.model.mesh_fit import check_plan_fits
from grok.model.params import num_parameters
from grok.plan.compile_process import cache_loop_count
from grok.plan.programs import bytes_per_device, make_program, total_bytes
from tests.fixtures.models import replace_keys

MESH = {"slice": 1, "data": 2, "expert": 2, "tensor": 2}


def planned(run, **plan):
    dtype = "int8" if plan else "float32"
    model = dataclasses.replace(run.model, param_dtype=dtype)
    return dataclasses.replace(run, model=model, plan=PlanConfig(**plan))


def test_the_training_program_has_the_state_of_a_run(tiny_run):
    mesh = grok.make_mesh(**MESH)
    with jax.set_mesh(mesh):
        program = make_program(planned(tiny_run), mesh)
    parts = bytes_per_device(program.arguments)
    state = sum(size for name, size in parts.items() if name.startswith("state"))
    whole = 12 * num_parameters(tiny_run.model)
    assert whole / 8 < state < whole / 4  # norms and router are on every device
    # A checkpoint has each array once: parameters, two moments and a few counters.
    assert 0 < total_bytes(program.arguments["state"]) - whole < 100
    assert program.arguments["batch"]["tokens_BT"].shape == (
        tiny_run.data.batch_size,
        tiny_run.data.sequence_length,
    )


@pytest.mark.parametrize(("program", "sampled"), [("prefill", 2), ("decode", 2)])
def test_inference_programs_are_the_engine_s_with_its_sampling(tiny_run, program, sampled):
    config = planned(tiny_run, program=program, batch_size=8, tokens=16)
    mesh = grok.make_mesh(**MESH)
    with jax.set_mesh(mesh):
        made = make_program(config, mesh)
        result, cache, slots = made.jitted.lower(*made.arguments.values()).out_info
    # Eight rows on four groups of devices, each in one page of 32 tokens.
    assert made.jitted is forward_and_sample
    assert result.sampled_BU2.shape == (4, sampled, 2)
    assert cache.kv.shape == made.arguments["cache"].kv.shape
    assert cache.kv.shape[1] == 8
    assert slots.token_BS.shape == (4, 2)


def test_int4_halves_the_experts_of_a_decode_and_int4_all_attention_too(tiny_run):
    def parts(dtype: str) -> dict[str, int]:
        config = planned(tiny_run, program="decode", batch_size=8, tokens=16)
        model = dataclasses.replace(config.model, param_dtype=dtype)
        mesh = grok.make_mesh(**MESH)
        with jax.set_mesh(mesh):
            program = make_program(dataclasses.replace(config, model=model), mesh)
        return bytes_per_device(program.arguments)

    int8, int4, int4_all = map(parts, ("int8", "int4", "int4_all"))
    matrices = [name for name in int8 if name.endswith("values")]
    assert len(matrices) == 7
    for name in matrices:
        assert int4[name] == int8[name] / (2 if ".moe." in name else 1)
        assert int4_all[name] == int8[name] / 2


def test_adapters_over_int4_take_less(tiny_run):
    def experts(dtype: str) -> int:
        """Bytes of the experts' matrices on a device."""
        model = dataclasses.replace(tiny_run.model, param_dtype=dtype)
        train = dataclasses.replace(tiny_run.train, init_from="weights")
        run = dataclasses.replace(tiny_run, model=model, train=train, lora=LoraConfig(rank=2))
        mesh = grok.make_mesh(**MESH)
        with jax.set_mesh(mesh):
            parts = bytes_per_device(make_program(run, mesh).arguments)
        assert any(name.endswith("w_query_DNH.value.a") for name in parts)
        names = (name for name in parts if ".moe.w_" in name and "scales" not in name)
        return sum(parts[name] for name in names)

    assert experts("int4") == experts("bfloat16") / 4


def test_a_window_bounds_the_cache_of_a_decode(tiny_run):
    """A row of 120 tokens, 4 pages of 32: of 40 keys of them, and a prefill of 32 at a time, 3."""
    model = replace_keys(tiny_run.model, {"attention.window": 40})
    engine = dataclasses.replace(tiny_run.engine, prefill_chunk_size=32)
    run = dataclasses.replace(tiny_run, model=model, engine=engine)
    mesh = grok.make_mesh(**MESH)
    pages = {}
    for program in ("prefill", "decode"):
        with jax.set_mesh(mesh):
            config = planned(run, program=program, batch_size=8, tokens=120)
            arguments = make_program(config, mesh).arguments
        pages[program] = arguments["cache"].kv.shape[1]
        assert arguments["slots"].table_BSM.shape[-1] == 4
    assert pages == {"prefill": 8 * 4, "decode": 8 * 3}


def test_int8_pages_that_no_kernel_takes_are_refused(tiny_run, monkeypatch):
    """On a TPU, where the portable form would read a cache as slowly as silently."""
    engine = dataclasses.replace(tiny_run.engine, cache_dtype="int8", page_size=16)
    config = planned(
        dataclasses.replace(tiny_run, engine=engine), program="decode", batch_size=8, tokens=16
    )
    mesh = grok.make_mesh(**MESH)
    with jax.set_mesh(mesh):
        make_program(config, mesh)
        monkeypatch.setattr(hardware, "platform", lambda: "tpu")
        with pytest.raises(ConfigError, match=r"page_size=16 .* engine\.page_size=32 would work"):
            make_program(config, mesh)


def test_rows_that_cannot_be_split_are_refused(tiny_run):
    config = planned(tiny_run, program="decode", batch_size=6, tokens=16)
    with pytest.raises(ConfigError, match=r"plan\.batch_size=6 .* plan\.batch_size=8 would work"):
        check_plan_fits(config, 8)


def test_loops_over_the_cache_run_as_far_as_rows_are_long():
    overrides = ["plan.program=decode", "plan.tokens=2000"]
    assert cache_loop_count(load_config("grok-1", overrides)) == 16
    assert cache_loop_count(load_config("grok-1", [*overrides, "engine.page_size=256"])) == 8


def test_loops_over_the_cache_begin_at_the_window():
    """Of 2000 keys in blocks of 128, the last 1000 begin in the 8th."""
    overrides = ["plan.tokens=2000", "model.attention.window=1000"]
    assert cache_loop_count(load_config("grok-1", ["plan.program=decode", *overrides])) == 9
    assert cache_loop_count(load_config("grok-1", ["plan.program=prefill", *overrides])) == 16

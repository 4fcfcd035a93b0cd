"""The sections of `gpu.py` that measure: ceilings, training steps, decoding, products and the loss.

Each function is the work of one process: it gets `emit`, which takes a row of results as soon as it is known, and its case.
"""

import gc
import time
from typing import Any

import numpy as np

TURNS = 8
"""Times that a measured program multiplies by every kernel: starting a program takes as long as a few small products."""


def _device_bytes() -> dict[str, int]:
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def ceilings(emit, *, smoke: bool) -> None:
    """Bytes a second of a copy, and bfloat16 operations a second of a large product, on random data."""
    import jax
    import jax.numpy as jnp
    from gpu_models import queued

    key = jax.random.key(0, impl="rbg")
    big = jax.random.normal(key, (1 << (22 if smoke else 29),), jnp.float32)
    copy = jax.jit(lambda x: -x)
    seconds = queued([lambda: copy(big)])
    emit("copy", bytes_per_s=2 * big.nbytes / seconds, ms=1e3 * seconds)
    n = 512 if smoke else 8192
    a, b = (jax.random.normal(k, (n, n), jnp.bfloat16) for k in jax.random.split(key))
    product = jax.jit(lambda a, b: jnp.einsum("ik,kj->ij", a, b, preferred_element_type=jnp.float32).astype(a.dtype))
    seconds = queued([lambda: product(a, b)], seconds=0.5)
    emit(f"bf16 product {n}^3", flop_per_s=2 * n**3 / seconds, ms=1e3 * seconds)


def train(
    emit, *, shape: str, nf4: bool, rows: int, length: int, remat: str, segments: int = 0, steps: int = 10,
    ceiling: dict[str, float],
) -> None:  # fmt: skip
    """A LoRA or QLoRA step; layers are rematerialized after all when memory does not suffice."""
    import jax

    case = shape, nf4, rows, length
    try:
        return _train(emit, *case, remat, segments, steps, ceiling)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or remat == "layer":
            raise
        emit(f"remat {remat} does not fit", why=str(error).splitlines()[0][:200])
    # Out of the handler, whose traceback holds the arrays. The peak stays that of the attempt.
    gc.collect()
    _train(emit, *case, "layer", segments, steps, ceiling)


def _train(emit, shape, nf4, rows, length, remat, segments, steps, ceiling) -> None:
    import jax
    from gpu_models import (
        LORA,
        attention_of,
        flops_per_token,
        model_of,
        optimizer,
        random_batch,
        random_params,
        training,
    )

    import jlora
    from jlora.train import planned, predict

    start = time.perf_counter()
    model = model_of(shape, remat=remat)
    step, state, base = training(model, random_params(model, nf4=nf4))
    batch = random_batch(model, rows, length, segments=segments)
    jax.block_until_ready((state, base, batch))
    built = time.perf_counter()
    lowered = step.lower(state, base, batch, None)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ready = time.perf_counter()
    params = jlora.combine(state.adapter, base)
    predicted = predict(model, params, optimizer(), batch_size=rows, length=length).peak
    del params  # the step donates the adapter
    seconds, losses, norms = [], [], []
    for _ in range(3 + steps):
        begin = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, base, batch, None))
        seconds.append(time.perf_counter() - begin)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    # A benchmark that trains nothing would be fast.
    assert min(norms) > 0 and np.isfinite(losses).all() and losses[-1] < losses[0], (losses, norms)
    taken = seconds[3:]
    low, median, high = np.percentile(taken, [25, 50, 75])
    speed = rows * length / median
    flops = flops_per_token(model, length) * speed
    memory = _device_bytes()
    peak = memory.get("peak_bytes")
    emit(
        f"{shape} {'QLoRA' if nf4 else 'LoRA'} {rows}x{length} remat {remat}"
        + (f" {segments} segments" if segments else ""),
        tokens_per_s=speed,
        step_ms=1e3 * median,
        step_ms_quartiles=[1e3 * low, 1e3 * high],
        TFLOP_per_s=flops / 1e12,
        mfu_790=flops / 790e12,
        of_measured_product=flops / ceiling["flop_per_s"],
        **memory,
        predicted_bytes=predicted,
        planned_bytes=planned(compiled),
        predicted_over_peak=predicted / peak if peak else None,
        attention=attention_of(compiled),
        build_s=built - start,
        trace_s=traced - built,
        compile_s=ready - traced,
        first_step_s=seconds[0],
        to_first_step_s=ready - built + seconds[0],
        rank=LORA.rank,
        losses=[losses[0], losses[-1]],
        grad_norm=norms[0],
    )


def peft(emit, *, shape: str, rows: int, length: int, compiles: bool = False, steps: int = 10) -> None:
    """PEFT's LoRA on the same shape, SDPA attention: eager under autocast and with bfloat16 factors without it, or the latter by
    `torch.compile`."""
    import contextlib

    import peft as library
    import torch
    import transformers
    from gpu_models import LEARNING_RATE, LORA, SHAPES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {**SHAPES[shape], "use_cache": False, "attn_implementation": "sdpa"}
    config = transformers.AutoConfig.for_model(**fields)
    for autocast in (False,) if compiles else (True, False):
        torch.manual_seed(0)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = library.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=targets, lora_dropout=0.0)
        model = library.get_peft_model(model, lora, autocast_adapter_dtype=autocast).to(device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        forward = torch.compile(model) if compiles else model
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
        ids = torch.from_numpy(np.random.default_rng(0).integers(0, config.vocab_size, (rows, length))).to(device)
        seconds, losses, norms = [], [], []
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3 + steps):
            begin = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = forward(input_ids=ids, labels=ids).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            losses.append(float(loss))
            norms.append(float(norm))
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        assert min(norms) > 0 and losses[-1] < losses[0], (losses, norms)
        emit(
            f"{shape} PEFT LoRA {rows}x{length} {'compiled' if compiles else 'eager'}, "
            + ("float32 factors, autocast" if autocast else "bfloat16 factors"),
            tokens_per_s=rows * length / float(np.median(seconds[3:])),
            step_ms=1e3 * float(np.median(seconds[3:])),
            peak_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else None,
            first_step_s=seconds[0],
            losses=[losses[0], losses[-1]],
        )
        del model, forward, trained, optimizer, loss
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def decode(emit, *, shape: str, new_tokens: int, ceiling: dict[str, float]) -> None:
    """Greedy generation after a prompt of 32 tokens, from stacked layers; the roofline reads the weights as they are stored and
    the cache once a token."""
    import jax
    from gpu_models import in_threads, model_of, random_params

    import jlora
    from jlora.models import empty_cache

    model = model_of(shape)
    for nf4 in (False, True):
        params = random_params(model, nf4=nf4)

        def run(batch, params=params):
            prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, 32))
            return jlora.generate(model, params, prompts, max_new_tokens=new_tokens, temperature=0, eos_token_id=[])

        start = time.perf_counter()
        in_threads(run, (1, 8))
        compiled = time.perf_counter() - start
        for batch in (1, 8):
            times = []
            for _ in range(3):
                start = time.perf_counter()
                rows = run(batch)
                times.append(time.perf_counter() - start)
            assert [len(row) for row in rows] == [new_tokens] * batch
            # The prompt's pass counts as one token's.
            token = float(np.median(times)) / new_tokens
            cache = jlora.nbytes(jax.eval_shape(lambda b=batch: empty_cache(model, b, 32 + new_tokens, stacked=True)))
            untied = 0 if model.config.tie_word_embeddings else jlora.nbytes(params["model"]["embed_tokens"])
            ideal = (jlora.nbytes(params) - untied + cache) / ceiling["bytes_per_s"]
            emit(
                f"{shape} {'NF4' if nf4 else 'bf16'} batch {batch}",
                tokens_per_s=batch / token,
                ms_per_token=1e3 * token,
                roofline_share=ideal / token,
                roofline_tokens_per_s=batch / ideal,
                compile_both_s=compiled,
            )
        del params


def products(emit, *, smoke: bool, ceiling: dict[str, float]) -> None:
    """Unpacking, and x [rows, in] times eight different kernels, dense and NF4 by each implementation."""
    import jax
    import jax.numpy as jnp
    from bench import KERNELS
    from gpu_models import in_threads, queued, random_blocks

    import jlora
    from jlora.quant.ggml import GGML_TYPES
    from jlora.quant.matmul import IMPLEMENTATIONS, implementation, quantized_matmul
    from jlora.weight import dense_matmul

    def draw(key, shape):
        return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(0.02)

    pack = jax.jit(lambda key, shape: jlora.quantize(draw(key, shape), jlora.NF4()), static_argnums=1)
    rows, columns = (256, 512) if smoke else (4 * 14336, 4096)
    packed = {"NF4": pack(jax.random.key(0, impl="rbg"), (columns, rows))}
    packed |= {name: random_blocks(GGML_TYPES[name](), rows, columns) for name in ("Q8_0", "Q4_0", "Q4_K", "Q6_K")}
    unpack = jax.jit(lambda q: q.rows(jnp.bfloat16))
    for name, q in packed.items():
        seconds = queued([lambda q=q: unpack(q)])
        moved = q.nbytes + 2 * q.size
        emit(
            f"dequantize {name} {columns}x{rows} to bf16",
            GB_per_s=moved / seconds / 1e9,
            of_copy=moved / seconds / ceiling["bytes_per_s"],
            ms=1e3 * seconds,
        )
    del packed

    labels = {"up_proj": "Llama-3.2-1B", "down_proj": "Llama-3.1-8B"}
    for name, label in labels.items():
        shape = (128, 256) if smoke else KERNELS[label][name]
        keys = jax.random.split(jax.random.key(1, impl="rbg"), 8)
        weights = {"dense": [draw(key, shape) for key in keys], "nf4": [pack(key, shape) for key in keys]}

        def dense(x, w):
            return dense_matmul(x, w, transpose=False, out_dtype=x.dtype)

        def quantized(way):
            return lambda a, q: quantized_matmul(way, False, a.dtype, a.dtype, a, q)

        cases = []
        for rows in (1, 2, 4, 16, 4096) if not smoke else (1, 16):
            cases.append((rows, "dense bf16", dense, weights["dense"]))
            for way in IMPLEMENTATIONS:
                if way != "reduce" or rows <= 4:
                    cases.append((rows, f"NF4 {way}", quantized(way), weights["nf4"]))

        def compiled(case, shape=shape):
            rows, _, product, kernels = case
            x = draw(jax.random.key(2, impl="rbg"), (rows, shape[0]))

            def every(x, kernels):
                def body(_, carry):
                    # Another x each time, or the loop's work would be done before it.
                    return carry[0] + jnp.asarray(1e-3, x.dtype), [product(carry[0], w) for w in kernels]

                start = x, [jnp.zeros((x.shape[0], shape[1]), x.dtype) for _ in kernels]
                return jax.lax.fori_loop(0, TURNS, body, start)[1]

            return jax.jit(every).lower(x, kernels).compile(), x

        seconds_dense = None
        for case, (run, x) in zip(cases, in_threads(compiled, cases), strict=True):
            rows, way, _, kernels = case
            seconds = queued([lambda run=run, x=x, kernels=kernels: run(x, kernels)], seconds=0.1)
            seconds /= TURNS * len(kernels)
            seconds_dense = seconds if way.startswith("dense") else seconds_dense
            moved = jlora.nbytes(kernels[0]) + 2 * rows * sum(shape)
            operations = 2 * rows * shape[0] * shape[1]
            ideal = max(moved / ceiling["bytes_per_s"], operations / ceiling["flop_per_s"])
            chosen = implementation(rows, jax.default_backend())
            emit(
                f"{label} {name} {shape[0]}x{shape[1]} rows {rows} {way}{'*' if way == f'NF4 {chosen}' else ''}",
                us=1e6 * seconds,
                GB_per_s=moved / seconds / 1e9,
                TFLOP_per_s=operations / seconds / 1e12,
                roofline_share=ideal / seconds,
                speed_of_dense_bf16=seconds_dense / seconds,
            )
        del weights, cases


def loss(emit, *, smoke: bool) -> None:
    """The chunked loss with its gradient against the two products that it cannot do without."""
    for width in (128,) if smoke else (2048, 4096):
        _loss(emit, width, *((64, 512, (32,)) if smoke else (4096, 128256, (512, 1024, 2048, 4096))))


def _loss(emit, width: int, tokens: int, vocab: int, chunks: tuple[int, ...]) -> None:
    import jax
    import jax.numpy as jnp
    from gpu_models import in_threads, queued

    from jlora.train.loss import CHUNK, cross_entropy

    keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)
    hidden = jax.random.normal(keys[0], (tokens, width), jnp.bfloat16)
    head = jax.random.normal(keys[1], (vocab, width), jnp.bfloat16) * jnp.bfloat16(0.02)
    targets = jax.random.randint(keys[2], (tokens,), 0, vocab)
    live = jnp.ones(tokens, bool)
    given = hidden, head, targets, live

    def plain(hidden, head, targets, live):
        logits = jnp.einsum("td,vd->tv", hidden, head, preferred_element_type=jnp.float32).astype(hidden.dtype)
        # Without the barrier the compiler could join the two products.
        logits = jax.lax.optimization_barrier(logits)
        return jnp.einsum("tv,vd->td", logits, head, preferred_element_type=jnp.float32).astype(hidden.dtype)

    def chunked(size):
        def run(hidden, head, targets, live):
            return cross_entropy(hidden, head, targets, live, transpose=True, chunk=size)

        return jax.value_and_grad(run)

    few = hidden[:64], head, targets[:64], live[:64]
    logits = jnp.einsum("td,vd->tv", few[0], head, preferred_element_type=jnp.float32)
    exact = jnp.sum(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, few[2][:, None], -1)[:, 0])
    emit(f"d={width} loss of 64 tokens", chunked=float(jax.jit(chunked(32))(*few)[0]), whole_logits=float(exact))

    default = CHUNK.get(jax.default_backend(), CHUNK["gpu"])
    sizes = sorted({default, *chunks})
    functions = {"two products": plain} | {f"chunk {size}": chunked(size) for size in sizes}
    programs = in_threads(lambda f: jax.jit(f).lower(*given).compile(), functions.values())
    base = None
    for name, program in zip(functions, programs, strict=True):
        seconds = queued([lambda program=program: program(*given)], seconds=0.3)
        base = base or seconds
        emit(
            f"d={width} T={tokens} V={vocab} {name}{'*' if name == f'chunk {default}' else ''}",
            ms=1e3 * seconds,
            of_two_products=seconds / base,
            TFLOP_per_s=4 * tokens * vocab * width / seconds / 1e12,
            temp_bytes=program.memory_analysis().temp_size_in_bytes,
        )


SECTIONS: dict[str, Any] = {f.__name__: f for f in (ceilings, train, peft, decode, products, loss)}

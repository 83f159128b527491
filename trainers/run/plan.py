"""What a run prints first, and `--dry_run` alone."""

from trainers.record import carriers
from trainers.run.inner_loop import InnerLoop
from trainers.settings import recipes
from trainers.settings.rules import check_batch


def plan(loop: InnerLoop) -> str:
    """Devices, batch arithmetic, data, models and cadences, a row each."""
    config, replicas, dataset = loop.config, loop.world.replicas, loop.dataset
    share = check_batch(config, replicas)
    reading = "read by index" if dataset.train.records else "streamed"
    placement = "resident on the device" if dataset.train.arrays is not None else reading
    call = config.steps_per_call or "about a second's worth"
    devices = ", ".join(device.split("device:")[-1] for device in loop.world.strategy.extended.worker_devices)
    rows = {
        **({"recipe": recipes.described(config)} if config.recipe else {}),
        "strategy": f"{config.strategy}, {replicas} replica{'s' if replicas > 1 else ''}: {devices}",
        "batch": f"{config.batch_size} examples = {replicas} × {share}"
        + (f", each in {config.parts} parts" if config.parts > 1 else "")
        + (f" (found by {loop.found['accumulate']['by']})" if "accumulate" in loop.found else ""),
        "data": f"{dataset.name}: {dataset.train.size} train, {dataset.eval.size} eval examples, {placement}",
        **loop.describe(),
        "cadences": f"log {config.log_every}, evaluate {config.eval_every}, checkpoint {config.checkpoint_every}, "
        f"call {call}",
        "run_dir": carriers.shown(config.run_dir),
    }
    return "\n".join(f"{name:<9} {value}" for name, value in rows.items())

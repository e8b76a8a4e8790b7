"""From options to objects: data, loader, students, engine and trainer; what ranks compare."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dml_fast.config import TrainConfig, flag
from dml_fast.config.fields import names_in
from dml_fast.data import DataSet, RetrievalSet, open_dataset
from dml_fast.data.features import Features
from dml_fast.data.loaders import train_loader
from dml_fast.data.loaders.assemble import Loader
from dml_fast.data.plan import Augmentation
from dml_fast.data.weight_files import read_weights
from dml_fast.distributed.connect import pick_local_device
from dml_fast.distributed.launch import Launch
from dml_fast.distributed.world import World, agreed
from dml_fast.engine import Cohort, Engine, Precision, Student, Teacher
from dml_fast.engine.choice import check_executor, make_executor
from dml_fast.engine.precision import pick_device
from dml_fast.errors import UserError
from dml_fast.eval.checks import check_images
from dml_fast.machine import keep_freed_memory
from dml_fast.models import InputSpec
from dml_fast.reporting.console import Reporter
from dml_fast.reporting.loggers import Logs
from dml_fast.rng import derive_seed
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.folder import Run
from dml_fast.training.classes import class_weights_of, prior_of, say_what_balance_means
from dml_fast.training.extra import extra_of
from dml_fast.training.meter import Meter
from dml_fast.training.saving import Progress, Saver
from dml_fast.training.shares import share_out_by_cost
from dml_fast.training.signals import StopRequest
from dml_fast.training.start import NEW, Start
from dml_fast.training.students import blank, build_cohort, head_of
from dml_fast.training.teachers import check_fit, copy_teachers, read_teachers
from dml_fast.training.trainer import Trainer
from dml_fast.training.unlabelled import settled
from dml_fast.training.watch import HashWatch

logger = logging.getLogger(__name__)


def build_trainer(
    config: TrainConfig,
    run: Run,
    resume: Path | None,
    stop: StopRequest,
    world: World | None = None,
    features: Features | None = None,
) -> Trainer:
    """Open the data, build the cohort, and put it where a checkpoint left it.

    Args:
        config: checked.
        run: a folder that can be written to.
        resume: the run folder or one of its checkpoints to continue from; None for a new run.
        stop: asks to stop after a step.
        world: the processes that train together; by default this one alone.
        features: for a new run, in place of those that would be fitted to its rows.

    Raises:
        UserError: the data, a student, the checkpoint or the disk does not allow the run.
    """
    world = world or World.alone(len(config.architectures))
    device = device_of(config, world.launch)
    precision = Precision.choose(config.amp, config.amp_dtype, device)
    check_executor(config.executor, device)
    if device.type == "cpu":
        keep_freed_memory()
    reporter = Reporter(Logs(names_in(config.log) if world.main else ()))
    begun = resume is not None and run.config_file.is_file()  # bad data may have stopped it before
    with stop.at_once():  # downloading and decoding may take hours
        own = run.with_own_files(config) if begun else config
        data = _open_data(own, device, world, run.features if begun else features)
    with world.all_or_none():
        config = settled(config, data, world.mesh.data)
    weights = world.from_main(lambda: class_weights_of(own, data)) if own.class_weights else None
    facts = DataFacts.of(data, head_of(config))
    if config.shares == "measured":
        _measure_shares(config, facts, precision, world)
    with world.all_or_none():
        loader = _build_loader(config, data, device, world)
    checkpoint = run.to_continue(resume) if resume else None
    with world.all_or_none():
        start = NEW if checkpoint else Start.of(config, facts)
        teachers, config = read_teachers(config, run, begun)
        check_fit(teachers, facts, config)
    cohort = build_cohort(
        config,
        precision,
        num_classes=len(facts.classes),
        inputs=facts.inputs,
        world=world,
        start=start,
    )
    start.check(cohort, config.method)
    fixed = [one.for_engine(facts, config, precision) for one in teachers]
    engine = _build_engine(config, data, cohort, device, weights, fixed)
    progress = Progress(Meter(len(cohort), device, world), config.executor)
    saver = Saver(config, run, facts, data.corrupt, cohort, progress)
    needed = saver.bytes_needed() + sum(one.bytes for one in teachers)
    files = data.features.files() if data.features and not begun else {}
    with world.all_or_none():
        if world.main:
            run.check_writable(needed + sum(map(len, files.values())))
            run.write_features(files)
            if not begun:
                run.copy_given_files(config)
                copy_teachers(teachers, run)
        if checkpoint:
            saver.resume(checkpoint)
    if config.small_loss:
        logger.info(
            "small loss: the share of the labels that are left out grows to %g %% over %.3g epochs",
            100 * config.small_loss,
            config.small_loss_warmup(loader.steps_per_epoch),
        )
    if teachers:
        names = ", ".join(f"{one.name} ({one.arch})" for one in teachers)
        logger.info("teachers, which do not learn: %s", names)
    with world.all_or_none():
        reporter.logs.open(run, config.to_dict(), progress.history)
    reporter.start(config, data, saver.describe(), precision, world)
    if checkpoint:
        logger.info("continuing %s at step %d", checkpoint, progress.step)
    elif resume:
        logger.info("%s has no checkpoint yet: starting from its beginning", run.folder)
    watch = HashWatch(device, world) if extra_of(config).key == "mihash" else None
    return Trainer(config, data, precision, loader, engine, progress, saver, reporter, stop, watch)


def device_of(config: TrainConfig, launch: Launch) -> torch.device:
    """Return the device of this process.

    Raises:
        UserError: there is no such device, or there are more processes than GPUs.
    """
    return pick_device(pick_local_device(config.device, launch))


def facts_of(config: TrainConfig) -> dict[str, object]:
    """Return the options by flag, which must be the same on all ranks."""
    return {flag(name): value for name, value in config.to_dict().items()}


def _open_data(
    config: TrainConfig, device: torch.device, world: World, features: Features | None
) -> DataSet:
    """Open the data on every rank, after rank 0 has fetched what is not there.

    Args:
        config: of the run.
        device: of this process.
        world: the processes.
        features: that are there already, or None. Rank 0 fits new ones, for all.

    Raises:
        UserError: it cannot be read, or ranks see different data.
    """
    options = {**config.data_options, "device": str(device), "features": features}
    if config.download and not world.single:
        world.from_main(lambda: open_dataset(config.data, download=True, **options).fingerprint)
    if config.input_kind == "vector" and features is None and not world.single:
        options["features"] = world.from_main(lambda: open_dataset(config.data, **options).features)
    with world.all_or_none():
        if world.main and config.class_weights_file:
            read_weights(config.class_weights_file)  # before images are decoded for minutes
        data = open_dataset(config.data, download=config.download and world.main, **options)
        if isinstance(data.val, RetrievalSet):  # some of its files may have been skipped
            check_images(data.val, config.val_protocol, "--val-protocol")
        _check_views(config, data)
    found = world.all_gather(data.fingerprint)
    for rank, fingerprint in enumerate(found):
        if fingerprint != found[0]:
            raise agreed(
                UserError(
                    f"rank {rank} has other images or labels in --data {config.data} than rank 0: "
                    "give all ranks the same data"
                )
            )
    return data


def _check_views(config: TrainConfig, data: DataSet) -> None:
    """Refuse more views than students: some would be read by none."""
    views, students = len(data.inputs), len(config.architectures)
    if views > students:
        raise UserError(
            f"--data {config.data} has {views} views and the cohort {students} students, so nobody "
            f"would read the last: give --cohort {views}, or fewer views"
        )


def _measure_shares(
    config: TrainConfig, facts: DataFacts, precision: Precision, world: World
) -> None:
    """Share the students out by the time that a step of each takes on a column's rows."""

    def student(arch: str, spec: InputSpec) -> tuple[Student, torch.Tensor]:
        alone = replace(
            config,
            optimizer=config.algorithms[0],
            lr=config.peak_lrs[0],
            momentum=config.each("momentum")[0],
            weight_decay=config.each("weight_decay")[0],
            arch=arch,
            cohort=1,
            method="independent",
            compile="off",
        )
        cohort = build_cohort(alone, precision, num_classes=len(facts.classes), inputs=[spec])
        rows = config.rows_of_pass(world.mesh.data)
        return cohort.students[0], blank(rows, spec, precision)

    archs = config.architectures
    share_out_by_cost(world, [(arch, facts.input_of(k)) for k, arch in enumerate(archs)], student)


def _build_loader(config: TrainConfig, data: DataSet, device: torch.device, world: World) -> Loader:
    assert config.unlabelled_share != "auto"  # the configuration is settled
    say_what_balance_means(config, data)
    return train_loader(
        data,
        Augmentation(
            pad=data.pad if config.augment else 0,
            flip=data.flip and config.augment,
            resized=config.resized_crop and config.augment,
            policy=config.augment_policy,
            erasing=config.random_erasing,
            jitter=config.color_jitter,
            mixup=config.mixup,
            cutmix=config.cutmix,
        ),
        batch_size=config.batch_size // world.mesh.data,
        seed=derive_seed(config.seed, "data"),
        device=device,
        channels_last=config.channels_last,
        num_instances=config.num_instances if config.retrieval else 0,
        unlabelled_share=config.unlabelled_share,
        epoch_steps=config.epoch_steps,
        balance=config.balance,
        dither=config.dither,
        symmetrise=config.symmetrise,
        views=len(config.architectures) if config.views == "per-student" else 1,
        students=len(config.architectures),
        threads=config.data_threads,
        rank=world.column,
        ranks=world.mesh.data,
    )


def _build_engine(
    config: TrainConfig,
    data: DataSet,
    cohort: Cohort,
    device: torch.device,
    class_weight: torch.Tensor | None,
    teachers: Sequence[Teacher],
) -> Engine:
    extra = extra_of(config)
    if config.accumulate > 1 and any(student.norms for student in cohort):
        rows = config.rows_of_pass(cohort.world.mesh.data)
        logger.info("--accumulate: BatchNorm normalises each part of %d rows by itself", rows)
    return Engine(
        cohort,
        method=config.method,
        kl_weight=config.kl_weight,
        temperature=config.temperature,
        label_smoothing=config.label_smoothing,
        peer_reduction=config.peer_reduction,
        update=config.update,
        feature_loss=extra.loss,
        feature_weight=extra.weight,
        prior=prior_of(config, data),
        class_weight=class_weight,
        small_loss=config.small_loss,
        teach_with=config.teach_with,
        teachers=teachers,
        clip_norm=None if config.clip_norm == "off" else config.clip_norm,
        parts=config.accumulate,
        distribution="bernoulli" if data.several_labels else "categorical",
        executor=make_executor(config.executor, len(cohort), device),
    )

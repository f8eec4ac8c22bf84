"""The theoretical peak of this processor by dtype: operations a cycle of its cores, times clock, times cores.

Operations a cycle follow from the core's design (a multiply-add is two): `fma_units x lanes x 2`. The instruction
set alone does not say: AVX-512 runs on two 512-bit units (Intel server, Zen 5), on one, or on two 256-bit ones taken
together (Zen 4). So a core is looked up by vendor, family and model, and one that is not known has no peaks here: a
dtype without a known peak is absent. Sources: Intel's and AMD's optimization guides, uops.info; of Zen 4 measured
(AMD EPYC: one 512-bit vfmadd, vdpbf16ps or vpdpbusd a cycle at 3.68 GHz).
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from turbopump.core.units import human
from turbopump.hardware import clock, detect
from turbopump.hardware.specs import DeviceSpec

AMX = {"amx_bf16": ("bf16", 1024), "amx_fp16": ("fp16", 1024), "amx_int8": ("int8", 2048)}
"""Operations a cycle of one tile unit: a 16 x 16 x 32 product of bf16 (16384 of them) takes 16 cycles, int8 half."""
CORE_DESIGN = "design of the core"
HIGHEST_CLOCK_HZ = 6.5e9
HIGHEST_RAISE = {CORE_DESIGN: 2.5}  # a virtual machine may report less than half of the clock
HIGHEST_RAISE_OF_SHEET = 1.25  # a GPU runs above its data sheet's clock by less
CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")


@dataclass(frozen=True)
class Processor:
    """What /proc/cpuinfo says of the first processor."""

    vendor: str
    family: int
    model: int
    name: str
    flags: frozenset[str]
    reported_hz: float | None = None


@dataclass(frozen=True)
class Core:
    """A core's design: fp32 operations a cycle with its widest unit."""

    name: str
    fp32: int
    doubt: str = ""


def processor_spec(cores: int | None = None, cpuinfo: str | None = None, clock_hz: float | None = None) -> DeviceSpec:
    """The theoretical peak of `cores` cores (all physical ones this process may use, by default) of this processor.

    `note` says which core it is taken for and where the clock comes from. `clock_hz` and `cpuinfo` (the text of
    /proc/cpuinfo) are those of this machine unless given. A rate whose operations a cycle are not known is absent.
    """
    found = parse_cpuinfo(Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo)
    cores = cores or detect.num_physical_cores()
    hz, said = (clock_hz, "given") if clock_hz else _clock(found)
    core = core_of(found)
    if core is None:
        note = f"a core of {found.vendor}, family {found.family}, model {found.model} is not known here: no peak"
    elif hz is None:
        note = f"{core.name}, {core.fp32} fp32 operations a cycle; its clock is not known: no peak"
    else:
        note = f"{cores} x {core.name}, {core.fp32} fp32 operations a cycle, at {human(hz, 'Hz')} ({said})"
        note += f"; {core.doubt}" if core.doubt else ""
    per_cycle = operations_per_cycle(found)
    return DeviceSpec(
        name=found.name,
        flops_per_s={dtype: per * cores * hz for dtype, per in per_cycle.items()} if hz else {},
        memory_bytes=detect.memory_bytes(),
        clock_hz=hz,
        source=CORE_DESIGN,
        note=note,
    )


def parse_cpuinfo(text: str) -> Processor:
    """The first processor of /proc/cpuinfo, of x86 or Arm."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key.strip(), value.strip())

    def number(key: str) -> int:
        try:
            return int(values.get(key, ""), 0)
        except ValueError:
            return -1

    arm = "CPU implementer" in values
    megahertz = re.fullmatch(r"\d+(\.\d+)?", values.get("cpu MHz", ""))
    return Processor(
        vendor=values.get("CPU implementer" if arm else "vendor_id", "unknown"),
        family=number("CPU architecture" if arm else "cpu family"),
        model=number("CPU part" if arm else "model"),
        name=values.get("model name") or detect.cpu_name(),
        flags=frozenset(values.get("Features" if arm else "flags", "").split()),
        reported_hz=float(megahertz[0]) * 1e6 if megahertz else None,
    )


def _clock(found: Processor) -> tuple[float | None, str]:
    """The highest of what the system allows, what it reports and what a core was measured at, and which that is."""
    allowed = None
    with suppress(OSError, ValueError):
        allowed = int(CPUFREQ.read_text()) * 1e3
    candidates = {
        "the highest that the system allows": allowed,
        "measured by a chain of additions": clock.measured_clock_hz(),
        "as the system reports it, which may be below what it really runs at": found.reported_hz,
    }
    known = {said: hz for said, hz in candidates.items() if hz}
    if not known:
        return None, ""
    said = max(known, key=lambda name: known[name])
    return known[said], said


def operations_per_cycle(found: Processor) -> dict[str, int]:
    """Most operations a cycle and core by dtype; empty for a core that is not known.

    bf16 and fp16 by vector instructions are twice fp32 (an upper bound: some cores reach half of that), int8 by VNNI
    four times; without such instructions they are absent, whatever a library may do.
    """
    core = core_of(found)
    if core is None:
        return {}
    flags = found.flags
    per = {"fp64": core.fp32 // 2, "fp32": core.fp32}
    if "avx512_bf16" in flags:
        per["bf16"] = 2 * core.fp32
    if flags & {"avx512_fp16", "asimdhp"}:
        per["fp16"] = 2 * core.fp32
    if flags & {"avx512_vnni", "avx_vnni"}:
        per["int8"] = 4 * core.fp32
    for flag, (dtype, operations) in AMX.items():
        if flag in flags:
            per[dtype] = operations
    return per


def core_of(found: Processor) -> Core | None:
    """The design of a core by its maker's family and model numbers; None where it is not in the tables below.

    AMD: numbers as in Linux, arch/x86/kernel/cpu/amd.c; Intel: arch/x86/include/asm/intel-family.h.
    """
    if found.vendor == "AuthenticAMD" and "fma" in found.flags:
        return _amd(found)
    if found.vendor == "GenuineIntel" and found.family == 6 and "fma" in found.flags:
        return _intel(found)
    if found.vendor == "0x41":
        return ARM.get(found.model)
    return None


# two 128-bit units (or two of 256, or four of 128) x 2
ARM = {
    0xD0C: Core("Neoverse N1 core", 16),
    0xD49: Core("Neoverse N2 core", 16),
    0xD40: Core("Neoverse V1 core", 32),
    0xD4F: Core("Neoverse V2 core", 32),
}

_AMD_MODELS: tuple[tuple[int, range, Core], ...] = (
    (0x17, range(0x00, 0x30), Core("Zen core", 16)),
    (0x17, range(0x50, 0x60), Core("Zen core", 16)),
    (0x17, range(0x30, 0xB0), Core("Zen 2 core", 32)),
    (0x19, range(0x00, 0x10), Core("Zen 3 core", 32)),
    (0x19, range(0x20, 0x60), Core("Zen 3 core", 32)),
    (0x19, range(0x10, 0x20), Core("Zen 4 core", 32)),
    (0x19, range(0x60, 0xB0), Core("Zen 4 core", 32)),
    (0x1A, range(0x00, 0x20), Core("Zen 5 core", 64)),  # server: 512-bit units
    (0x1A, range(0x20, 0x30), Core("Zen 5 core, 256-bit units", 32)),  # mobile
    (0x1A, range(0x40, 0x50), Core("Zen 5 core", 64)),  # desktop
    (0x1A, range(0x60, 0x70), Core("Zen 5 core, 256-bit units", 32)),
    (0x1A, range(0x70, 0x78), Core("Zen 5 core", 64)),
)


def _amd(found: Processor) -> Core | None:
    for family, models, core in _AMD_MODELS:
        if found.family == family and found.model in models:
            # a hypervisor that hides AVX-512 leaves the 256-bit instructions of Zen 5: half the operations
            return replace(core, fp32=32) if core.fp32 == 64 and "avx512f" not in found.flags else core
    return None


HASWELL_TO_COMET_LAKE = (60, 63, 69, 70, 61, 71, 79, 86, 78, 94, 142, 158, 165, 166)
SKYLAKE_SERVER = 85  # also Cascade Lake and Cooper Lake
TWO_UNITS = {106: "Ice Lake server", 108: "Ice Lake server", 143: "Sapphire Rapids", 207: "Emerald Rapids",
             173: "Granite Rapids", 174: "Granite Rapids"}  # fmt: skip
ONE_UNIT = {125: "Ice Lake", 126: "Ice Lake", 140: "Tiger Lake", 141: "Tiger Lake", 167: "Rocket Lake"}
HYBRID = {151: "Alder Lake", 154: "Alder Lake", 183: "Raptor Lake", 186: "Raptor Lake", 191: "Raptor Lake"}
KNIGHTS_LANDING = 87


def _intel(found: Processor) -> Core | None:
    model = found.model
    wide = "avx512f" in found.flags
    if model in HASWELL_TO_COMET_LAKE:
        return Core("Haswell to Comet Lake core", 32)
    if model == KNIGHTS_LANDING:
        return Core("Knights Landing core", 64)
    if model == SKYLAKE_SERVER:
        return _skylake_server(found.name) if wide else Core("Skylake server core without AVX-512", 32)
    if model in TWO_UNITS:
        return Core(f"{TWO_UNITS[model]} core", 64 if wide else 32)
    if model in ONE_UNIT:
        return Core(f"{ONE_UNIT[model]} core", 32)
    if model in HYBRID:
        return Core(f"{HYBRID[model]} core", 32, "its small cores do half of that, which is not counted")
    return None


def _skylake_server(name: str) -> Core:
    """One or two 512-bit units, as the product's name tells: Platinum and Gold 6000 have two, most others one."""
    if re.search(r"Silver|Bronze|Gold 5(?!122|222)\d", name):
        return Core("Skylake server core with one AVX-512 unit", 32)
    told = re.search(r"Platinum|Gold|W-[23]\d|i9-", name)
    doubt = "" if told else "the name hides whether it has two AVX-512 units or one: taken for two"
    return Core("Skylake server core with two AVX-512 units", 64, doubt)


def raise_to(spec: DeviceSpec, dtype: str, measured_flops_per_s: float) -> DeviceSpec:
    """`spec` with peaks that a measured rate does not exceed, and a note where they had to be raised.

    A rate above the peak says that the clock was higher than was known: all peaks rise with it. Where no processor
    has such a clock the operations a cycle were wrong, and the peak of this dtype alone becomes the measured rate. A
    dtype without a known peak stays without one.
    """
    peak = spec.flops_per_s.get(dtype)
    if peak is None or measured_flops_per_s <= peak:
        return spec
    factor = measured_flops_per_s / peak
    clock_hz = (spec.clock_hz or 0.0) * factor
    measured = f"{dtype} was measured at {human(measured_flops_per_s, 'FLOP/s')}"
    if 0 < clock_hz <= HIGHEST_CLOCK_HZ and factor <= HIGHEST_RAISE.get(spec.source, HIGHEST_RAISE_OF_SHEET):
        peaks = {name: rate * factor for name, rate in spec.flops_per_s.items()} | {dtype: measured_flops_per_s}
        note = f"clock raised to {human(clock_hz, 'Hz')}, at least: {measured}"
        return replace(spec, flops_per_s=peaks, clock_hz=clock_hz, note=_joined(spec.note, note))
    note = f"{measured}, above a peak of {human(peak, 'FLOP/s')} that must be wrong: replaced"
    return replace(spec, flops_per_s={**spec.flops_per_s, dtype: measured_flops_per_s}, note=_joined(spec.note, note))


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)

"""What `benchmarks.counters` reads of two pages of Nsight Compute."""

from benchmarks import counters

DETAILS = """\
[7] python3.12@127.0.0.1
  brainmass_kernels_forward (8192, 1, 1)x(128, 1, 1), Context 1, Stream 14, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    DRAM Frequency                  Ghz         3.20
    Elapsed Cycles                cycle    2,304,101
    Issue Slots Busy                  %        70.19
    Local Memory Spilling Requests                                0
    Local Memory Spilling Request Overhead           %      no data

    OPT   Every warp waits 5.3 cycles, which is       40.2

  brainmass_kernels_adjoint (8192, 1, 1)x(128, 1, 1), Context 1, Stream 14, Device 0, CC 9.0
    Duration                         ms         3.34
"""
SOURCE = """\
"Kernel Name","brainmass_kernels_forward",
"Address","Source","# Samples","Instructions Executed","stall_mio","stall_wait","stall_wait (Not Issued)"
"0x00","      FFMA R1, R2, R3, R4","10","600","1","9","4"
"0x10","@!P0  MUFU.TANH R5, R6","30","300","28","2","1"
"0x20","      FFMA R1, R2, R3, R4","-","100","0","0",""
"Kernel Name","brainmass_kernels_adjoint",
"Address","Source","# Samples","Instructions Executed","stall_mio","stall_wait","stall_wait (Not Issued)"
"0x00","      EXIT","0","1","0","0","0"
"""


def test_metrics_and_waits_of_each_launch_are_read():
    forward, adjoint = counters.joined(DETAILS, SOURCE)
    assert forward == {
        "kernel": "brainmass_kernels_forward",
        "metrics": {
            "Elapsed Cycles [cycle]": 2304101, "Issue Slots Busy [%]": 70.19, "Local Memory Spilling Requests": 0,
        },
        "waits": {"mio": 29, "wait": 11},
        "instructions": {
            "FFMA": {"executed": 700, "samples": 0.25}, "MUFU.TANH": {"executed": 300, "samples": 0.75},
        },
    }  # fmt: skip
    assert (adjoint["kernel"], adjoint["metrics"]) == ("brainmass_kernels_adjoint", {"Duration [ms]": 3.34})
    assert (adjoint["waits"], list(adjoint["instructions"])) == ({}, ["EXIT"])

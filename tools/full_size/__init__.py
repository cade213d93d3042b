"""Runs at full size without weights: the painters and reconstructors with random ones, and the stages of a run.

What a stage needs is read from a "gpu": the pretend one (`tools.pretend_gpu.gpu.PretendGPU`), which counts, or this
machine's (`device.RealGPU`), which measures. Both have
    device          where the models are
    memory          bytes of live tensors: `now`, the most since `reset()`: `peak`
    flops           `total` while `counting()`
    counting()      a context in which FLOPs are counted, for the first pass over the stages
    timed_passes    how many passes follow it, for the time
    clock()         seconds since some moment, when all that was asked of the device is done
"""

"""One program of benchmarks.model: timm's ConViT or DeiT, in a process of its own.

Needs PyTorch and timm, nothing of ours. Requests and answers are those of benchmarks/model_jax.py. On a GPU
it runs under bfloat16 autocast, on a CPU in float32, with PyTorch's fused AdamW.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

with contextlib.suppress(ImportError):
    import timm_here  # noqa: F401  # beside a build of PyTorch that misses torchvision's operators
import timm
import torch


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--image_size", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    torch.manual_seed(0)
    model = timm.create_model(options.model, img_size=options.image_size).to(device)
    images = torch.randn(options.batch, 3, options.image_size, options.image_size, device=device)
    targets = torch.nn.functional.one_hot(torch.arange(options.batch, device=device) % 1000, 1000).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)

    def autocast():
        return torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext()

    with torch.no_grad(), autocast():
        model(images[:1])  # makes the tables of relative positions, which compiling then takes as given
    forward = torch.compile(model) if options.compile else model

    def inference():
        with torch.inference_mode(), autocast():
            forward(images)

    def training():
        with autocast():
            loss = torch.nn.functional.cross_entropy(forward(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait():
        if gpu:
            torch.cuda.synchronize()

    def rate(once, seconds):
        """Steps a second, and a second of processor time; as in model_jax.py."""
        began = time.perf_counter()
        once()
        wait()
        steps = max(1, round(seconds / (time.perf_counter() - began)))
        began, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            once()
        wait()
        return steps / (time.perf_counter() - began), steps / (time.process_time() - processor)

    def peak_memory():
        if gpu:
            return torch.cuda.max_memory_allocated() / 1e6
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))

    ready = set()
    for line in sys.stdin:
        task, seconds = line.split()
        once = {"inference": inference, "training": training}[task]
        model.train(task == "training")
        answer = {}
        if task not in ready:
            began, processor = time.perf_counter(), time.process_time()
            once()
            wait()
            answer["first_step"] = time.perf_counter() - began
            answer["first_step_processor"] = time.process_time() - processor
            once()  # the second may compile again
            ready.add(task)
        if float(seconds):
            steps = rate(once, float(seconds))
            answer["images_per_second"], answer["images_per_processor_second"] = (
                options.batch * x for x in steps
            )
        if task == "training":  # inference needs less, and may come after it
            answer["peak_mb"] = peak_memory()
        name = torch.cuda.get_device_name() if gpu else "cpu"
        print(json.dumps({**answer, "device": name, "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()

"""One program of benchmarks.model, timm's ConViT or DeiT, in its own process.

Needs PyTorch and timm only. Requests and answers are those of benchmarks/model_jax.py. On a GPU it runs under
bfloat16 autocast, on a CPU in float32, with PyTorch's fused AdamW.
"""

import argparse
import contextlib
import json
import sys
import time

with contextlib.suppress(ImportError):
    import timm_here  # noqa: F401  # for a build of PyTorch without torchvision's operators
import timm
import torch

GPU = torch.cuda.is_available()


def autocast():
    return torch.autocast("cuda", torch.bfloat16) if GPU else contextlib.nullcontext()


def make_steps(options):
    """Returns (model, {task: function that runs one step})."""
    device = "cuda" if GPU else "cpu"
    torch.manual_seed(0)
    model = timm.create_model(options.model, img_size=options.image_size).to(device)
    images = torch.randn(options.batch, 3, options.image_size, options.image_size, device=device)
    targets = torch.nn.functional.one_hot(torch.arange(options.batch, device=device) % 1000, 1000).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    with torch.no_grad(), autocast():
        model(images[:1])  # makes the tables of relative positions, which must exist before compiling
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

    return model, {"inference": inference, "training": training}


def seconds_of(once, steps):
    """Returns the seconds that some steps take."""
    began = time.perf_counter()
    for _ in range(steps):
        once()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--image_size", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    model, steps_of = make_steps(options)
    for line in sys.stdin:
        task, seconds = line.split()
        once = steps_of[task]
        model.train(task == "training")
        answer = {"device": torch.cuda.get_device_name() if GPU else "cpu", "torch": torch.__version__}
        answer["first_step"] = seconds_of(once, 1)
        once()  # the second step may compile again
        steps = max(1, round(float(seconds) / seconds_of(once, 1)))
        answer["images_per_second"] = options.batch * steps / seconds_of(once, steps)
        if GPU:
            answer["program_mb"] = torch.cuda.max_memory_allocated() / 1e6
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

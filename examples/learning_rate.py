"""A study of one's own: which learning rate is best on a tenth of ImageNet (docs/experiments.md).

python -m convit_jax.study examples/learning_rate.py --config.data.dir=IMAGENET
"""


def get_plan():
    run = {"row": "ConViT-Ti", "config": "configs/convit_ti.py", "seeds": [0, 1, 2]}
    return {
        "title": "Learning rate",
        "question": "Which rate is best on a tenth of ImageNet?",
        "rows": "model",
        "columns": "learning rate",
        "scale": "log",
        "runs": [
            run | {"column": rate, "overrides": {"optim.lr": rate, "data.sampling_ratio": 0.1}}
            for rate in (2e-4, 5e-4, 1e-3)
        ],
    }

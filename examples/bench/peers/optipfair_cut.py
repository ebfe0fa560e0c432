"""A cut by optipfair, in each way that its usage guide has for the neurons of gated MLPs.

Static: PPM (also called MAW; its default), VOW, PON, L2, from weights alone. Data-driven: PPM with
a dataloader, which its guide recommends where domain text is at hand. It adds up one activation
norm per batch, so that the batch size matters: the guide's 8, and 1.
"""

import cut

STATIC = {"ppm": "MAW", "vow": "VOW", "pon": "PON", "l2": "L2"}
DATA_DRIVEN = {"data-driven-batch-8": 8, "data-driven-batch-1": 1}


def main() -> None:
    """Cut and save."""
    import torch
    from optipfair import prune_model
    from torch.utils.data import DataLoader, TensorDataset

    args = cut.options([*STATIC, *DATA_DRIVEN])
    model = cut.model_of(args.model)
    width = model.config.intermediate_size
    loader = None
    if args.setting in DATA_DRIVEN:
        tokens = cut.tokens_of(args.calibration)
        data = TensorDataset(tokens, torch.ones_like(tokens))
        loader = DataLoader(data, batch_size=DATA_DRIVEN[args.setting])
    seconds: dict[str, float] = {}
    with cut.clock(seconds, "cut"), cut.autocast(args.bf16):
        model = prune_model(
            model=model,
            pruning_type="MLP_GLU",
            neuron_selection_method=STATIC.get(args.setting, "MAW"),
            # It rounds the number removed down; half a neuron more keeps that from being one less.
            pruning_percentage=100 * (width - args.keep + 0.5) / width,
            dataloader=loader,
            show_progress=False,
        )
    cut.save(model, args.out, tool="optipfair", seconds=seconds, peak=cut.peak_bytes())


if __name__ == "__main__":
    main()

"""The only importer of megatron.core: model, optimizers, data, replay and training loop."""

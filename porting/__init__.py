"""Ports trained weights from PyTorch to Keras and proves, layer by layer, that nothing was lost.

In the order in which data flows: `checkpoint` reads a file into a state_dict, `key_map` and `layout` say where each
tensor goes, `convert` brings it there, `weights_file` writes and reads the result, `activations` and `parity`
compare the two models, and `port` puts these together. `family` is what the engine asks of a model family.
"""

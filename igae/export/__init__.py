# SPDX-License-Identifier: Apache-2.0
"""Exports: a trained autoencoder and its scenes in a folder that is read without the run, its data or its optimizers.

An export is a folder, at a local path, a fsspec URL or in a hub repository, of

* ``config.json``, ``diffusion_pytorch_model.safetensors``: the autoencoder as diffusers writes it;
* ``igae.safetensors``: what else all scenes share, by the names of the model's state: decoding MLP, normalizer's scale,
  background of the field;
* ``scenes-00000.safetensors`` and so on: planes, a row for each scene; ``scenes.json``: which scene is in which;
* ``config.yaml``: the resolved configuration of the run, where there was one; ``README.md``: the model card;
* ``igae.json``: how rays are sampled and what sizes are, and the files above with sizes and checksums. It is written
  last: a folder with it is complete.

```python
export = Export("hf://user/name")
image = export.scene("chair-0017").image(cam2world, intrinsics)[0]  # uint8 [H, W, 3]
```
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""RePaint: inpainting with denoising diffusion models (Lugmayr et al., CVPR 2022)."""

"""The model as other programs hold it: components and a pipeline of diffusers, over the one implementation."""

"""The checks, one module a category. registry.load() imports every module of this folder."""

"""The library as people use it; `peelwise` itself exports all of it."""

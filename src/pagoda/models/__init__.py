"""Models as data: a checkpoint's configuration becomes a spec, its tensors become weights under canonical names."""

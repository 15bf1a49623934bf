"""The command `nndist`: each sub-command reads its flags, does one thing and leaves with a code."""

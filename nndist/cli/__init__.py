"""The command `nndist`: each sub-command reads its flags, does one thing and exits with a code."""

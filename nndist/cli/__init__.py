"""The commands of launch/: each reads its flags, does one thing and leaves with a code."""

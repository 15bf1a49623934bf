"""Makes shards of a folder of images, for --shards of recipes/imagenet_resnet.py.

python launch/shard.py FOLDER OUT

This is `nndist shard`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["shard", *sys.argv[1:]])

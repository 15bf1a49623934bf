"""Makes shards of a folder of images, for --shards of recipes/imagenet_resnet.py.

python launch/shard.py FOLDER OUT
python launch/shard.py FOLDER OUT --shard-size 250    # megabytes of a shard

FOLDER holds train/<class>/*.JPEG and val/<class>/*.JPEG.
"""

import sys

from nndist.cli.commands import shard_command

if __name__ == "__main__":
    shard_command(sys.argv[1:], __doc__ or "")

"""Lists the recipes: what they are and what they reach.

python launch/recipes.py
python launch/recipes.py my_recipes --markdown
"""

import sys

from nndist.cli.commands import recipes_command

if __name__ == "__main__":
    recipes_command(sys.argv[1:], __doc__ or "")

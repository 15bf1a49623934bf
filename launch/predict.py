r"""Predicts with the networks of a run: answers to your own inputs.

python launch/predict.py runs/mnist_cnn/first digit.png photographs/ \
    --picture answers.png
python launch/predict.py runs/sum_mlp/first numbers.csv --json
python launch/predict.py runs/text_classifier_mlp/first 'guten Morgen'
python launch/predict.py runs/mnist_gan/first --num 50 --picture digits.png
"""

import sys

from nndist.cli.run_commands import predict_command

if __name__ == "__main__":
    predict_command(sys.argv[1:], __doc__ or "")

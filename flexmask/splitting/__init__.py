"""A tree larger than a row, cut into pieces that are not, with the least computed twice."""

from flexmask.splitting.overflow import Overflow as Overflow
from flexmask.splitting.overflow import SplitCount as SplitCount
from flexmask.splitting.overflow import check_budget as check_budget
from flexmask.splitting.overflow import split_overflow as split_overflow
from flexmask.splitting.pieces import Split as Split
from flexmask.splitting.pieces import split_tree as split_tree

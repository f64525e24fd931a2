from train.pruning import program
from train.runtime.runner import command_line

# What --help shows.
__doc__ = program.__doc__

if __name__ == '__main__':
    command_line(program.main, 'configs/pruning.py')

"""What a model makes of boards of Sudoku, and what its energies are worth."""

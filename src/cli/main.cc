// The `thriftattn` command.
#include "cli/commands.h"

int main(int argc, char** argv) { return thriftattn::cli::run_program(argc, argv); }

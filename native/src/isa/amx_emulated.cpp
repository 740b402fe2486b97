// Plain C++ with tiles in software: the logic of the kernels for AMX, on any machine. For tests.
#define PRUNUS_TABLE kernels_amx_emulated
#define PRUNUS_ISA_NAME "amx_emulated"
#define PRUNUS_TILES 1
#include "scalar.cpp"

// AVX-512 with BF16 and AMX (Sapphire Rapids and later): bfloat16 multiplies in tiles.
#define PRUNUS_TABLE kernels_amx
#define PRUNUS_ISA_NAME "amx"
#define PRUNUS_PAIRS 1
#define PRUNUS_TILES 1
#include "avx512.cpp"

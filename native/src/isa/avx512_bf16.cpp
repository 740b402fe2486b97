// AVX-512 with BF16 (Zen 4, Sapphire Rapids and later): bfloat16 multiplies in pairs.
#define PRUNUS_TABLE kernels_avx512_bf16
#define PRUNUS_ISA_NAME "avx512_bf16"
#define PRUNUS_PAIRS 1
#include "avx512.cpp"

// AVX-512 with VBMI2 and VNNI (Ice Lake, Zen 4 and later): int8 weights multiply as bytes.
#define PRUNUS_TABLE kernels_avx512_vnni
#define PRUNUS_ISA_NAME "avx512_vnni"
#include "avx512.cpp"

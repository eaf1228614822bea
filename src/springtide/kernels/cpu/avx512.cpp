#define SPRINGTIDE_WIDTH 16
#define SPRINGTIDE_LEVEL avx512
#define SPRINGTIDE_NAME "avx512"
#include "level.inc"

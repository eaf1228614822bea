#define SPRINGTIDE_WIDTH 8
#define SPRINGTIDE_LEVEL avx2
#define SPRINGTIDE_NAME "avx2"
#include "level.inc"

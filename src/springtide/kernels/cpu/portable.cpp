#define SPRINGTIDE_WIDTH 4
#define SPRINGTIDE_LEVEL portable
#define SPRINGTIDE_NAME "portable"
#include "level.inc"

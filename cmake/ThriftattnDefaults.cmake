# Build type, language level and flags that every target of this project shares.
include(GNUInstallDirs)

if(PROJECT_IS_TOP_LEVEL)
  if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
  endif()
  # Release stays at CMake's -O3: at -O2 GCC 12 leaves the accumulators of the matrix kernels in
  # memory, which makes them 2.7 times slower (measured: 31 instead of 84 GFLOP/s on one core).
  find_program(CCACHE_PROGRAM ccache)
  if(CCACHE_PROGRAM AND NOT DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
    set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  endif()
  set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
endif()

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)

# An interface target that is never installed: its users link it PRIVATE.
add_library(thriftattn_options INTERFACE)
# The order of operations is part of the formats, so the compiler must not fuse a*b+c.
target_compile_options(thriftattn_options INTERFACE
  -ffp-contract=off -Wall -Wextra
  # Structs with designated initialisers take the place of long argument lists.
  -Wno-missing-field-initializers
  # GCC 12 sees overlaps in std::string that cannot be (its bug 105651).
  $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>
  $<$<CONFIG:Debug>:-D_GLIBCXX_ASSERTIONS>)
target_compile_definitions(thriftattn_options INTERFACE
  HWY_DISABLED_TARGETS=${THRIFTATTN_HWY_DISABLED_TARGETS})

if(THRIFTATTN_SANITIZE)
  string(REPLACE ";" "," sanitizers "${THRIFTATTN_SANITIZE}")
  add_compile_options(-fsanitize=${sanitizers} -fno-omit-frame-pointer
                      -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${sanitizers})
endif()
if(THRIFTATTN_FUZZ AND NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  message(FATAL_ERROR "THRIFTATTN_FUZZ needs Clang: set CMAKE_CXX_COMPILER=clang++ "
                      "(or use `cmake --preset fuzz`)")
endif()
# Coverage only where the fuzzers look: it would slow the kernels that the same build tests.
if(THRIFTATTN_FUZZ)
  file(GLOB fuzzed_sources CONFIGURE_DEPENDS src/policy/*.cc src/engine/gguf*.cc)
  set_source_files_properties(${fuzzed_sources} PROPERTIES COMPILE_OPTIONS
                              -fsanitize=fuzzer-no-link)
endif()

# The CUDA backend: where nvcc is found (THRIFTATTN_CUDA=AUTO), always (ON) or never (OFF).
#
# sm_90a is compiled whole. The other targets take code too, and CI has two cores, so by default
# they get what models mostly need, head_dim 128; THRIFTATTN_CUDA_ALL=ON (make cuda-all) compiles
# every target x head_dim. A device without its code says so at the first launch.
set(THRIFTATTN_CUDA AUTO CACHE STRING "The CUDA backend: AUTO, ON or OFF")
set_property(CACHE THRIFTATTN_CUDA PROPERTY STRINGS AUTO ON OFF)
option(THRIFTATTN_CUDA_ALL "Compile every CUDA target for every head_dim" OFF)
set(THRIFTATTN_CUDA_OTHERS 80 89 120 CACHE STRING
    "Compute capabilities to compile for besides 9.0a; empty for a build for Hopper alone")
option(THRIFTATTN_ARRIVE_EACH "For compute-sanitizer's racecheck: every lane arrives where warps meet" OFF)
set(thriftattn_cuda_least 12.8)  # sm_120

set(THRIFTATTN_WITH_CUDA OFF)
if(NOT THRIFTATTN_CUDA STREQUAL "OFF")
  find_program(THRIFTATTN_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_PATH ENV CUDA_HOME
               PATHS /usr/local/cuda PATH_SUFFIXES bin)
  set(why "no nvcc was found")
  if(THRIFTATTN_NVCC)
    execute_process(COMMAND ${THRIFTATTN_NVCC} --version OUTPUT_VARIABLE text ERROR_QUIET)
    string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${text}")
    set(version "${CMAKE_MATCH_1}")
    if(version VERSION_GREATER_EQUAL thriftattn_cuda_least)
      set(THRIFTATTN_WITH_CUDA ON)
    else()
      set(why "${THRIFTATTN_NVCC} is version ${version}, ${thriftattn_cuda_least} or later is needed")
    endif()
  endif()
  if(THRIFTATTN_WITH_CUDA)
    set(CMAKE_CUDA_COMPILER ${THRIFTATTN_NVCC} CACHE FILEPATH "CUDA compiler")
    set(CMAKE_CUDA_ARCHITECTURES 90a-real)
    if(CCACHE_PROGRAM AND NOT DEFINED CMAKE_CUDA_COMPILER_LAUNCHER)
      set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
    endif()
    enable_language(CUDA)
    # CMake 3.25 does not know that this nvcc has C++20.
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
    endif()
    find_package(CUDAToolkit REQUIRED)
    set(part "for head_dim 128")
    if(THRIFTATTN_CUDA_ALL)
      set(part "whole")
    endif()
    set(also)
    foreach(sm IN LISTS THRIFTATTN_CUDA_OTHERS)
      string(APPEND also ", sm_${sm} ${part}")
    endforeach()
    message(STATUS "CUDA backend: nvcc ${version}; sm_90a whole${also}")
  elseif(THRIFTATTN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "THRIFTATTN_CUDA=ON: ${why}; install the CUDA toolkit or set THRIFTATTN_CUDA=OFF")
  else()
    message(STATUS "CUDA backend: left out, ${why}; set CMAKE_CUDA_COMPILER or THRIFTATTN_CUDA=ON")
  endif()
endif()

# The compiler's options for the targets besides sm_90a, in the variable `name`.
function(thriftattn_cuda_others name)
  set(options)
  foreach(sm IN LISTS THRIFTATTN_CUDA_OTHERS)
    list(APPEND options "-gencode=arch=compute_${sm},code=sm_${sm}")
  endforeach()
  set(${name} ${options} PARENT_SCOPE)
endfunction()

# Adds the kernels to the library `target`, as objects with their own flags.
function(thriftattn_add_cuda target)
  file(GLOB kernels CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/cuda/*.cu)
  add_library(thriftattn_kernels OBJECT ${kernels})
  target_include_directories(thriftattn_kernels PRIVATE
    ${PROJECT_SOURCE_DIR}/include ${PROJECT_BINARY_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_definitions(thriftattn_kernels PRIVATE THRIFTATTN_WITH_CUDA)
  target_compile_options(thriftattn_kernels PRIVATE
    --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers)
  if(THRIFTATTN_ARRIVE_EACH)
    target_compile_definitions(thriftattn_kernels PRIVATE THRIFTATTN_ARRIVE_EACH)
  endif()
  set_target_properties(thriftattn_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON)
  thriftattn_cuda_others(others)
  foreach(kernel IN LISTS kernels)
    set(flags)
    if(THRIFTATTN_CUDA_ALL OR NOT kernel MATCHES "_(64|192|256)\\.cu$")
      list(APPEND flags ${others})
    endif()
    if(kernel MATCHES "/append(_[0-9]+)?\\.cu$")
      list(APPEND flags --fmad=false)  # the order of operations is the page format
    endif()
    set_source_files_properties(${kernel} PROPERTIES COMPILE_OPTIONS "${flags}")
  endforeach()
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:thriftattn_kernels>)
  target_compile_definitions(${target} PRIVATE THRIFTATTN_WITH_CUDA)
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
endfunction()

# Adds `kernels` for every target of code to the library `target`, as the objects `name`.
function(thriftattn_add_cuda_objects target name kernels)
  thriftattn_cuda_others(others)
  add_library(${name} OBJECT ${kernels})
  target_include_directories(${name} PRIVATE
    ${PROJECT_SOURCE_DIR}/include ${PROJECT_BINARY_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_definitions(${name} PRIVATE THRIFTATTN_WITH_CUDA)
  target_compile_options(${name} PRIVATE
    --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers ${others})
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${name}>)
  target_compile_definitions(${target} PRIVATE THRIFTATTN_WITH_CUDA)
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
endfunction()

# The device bench of the library `target`, and thriftattn_cuda_bench, of bench/: timings of a fixed
# list of shapes on a GPU machine (make gpu-bench).
function(thriftattn_add_cuda_bench target)
  file(GLOB kernels CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/bench/*.cu)
  thriftattn_add_cuda_objects(${target} thriftattn_bench_kernels "${kernels}")
  if(THRIFTATTN_BUILD_TESTS)
    add_executable(thriftattn_cuda_bench ${PROJECT_SOURCE_DIR}/bench/attend_cuda_bench.cc)
    target_link_libraries(thriftattn_cuda_bench
      PRIVATE ${target} nlohmann_json::nlohmann_json thriftattn_options)
  endif()
endfunction()

# The engine's kernels and its device code. cuBLASLt is loaded when it is needed, so that the command
# starts on machines without it; only its header is needed here.
function(thriftattn_add_cuda_engine target)
  file(GLOB kernels CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/engine/*.cu)
  thriftattn_add_cuda_objects(${target} thriftattn_engine_kernels "${kernels}")
  target_include_directories(thriftattn_engine_kernels PRIVATE ${THRIFTATTN_CUBLASLT_INCLUDE})
  target_include_directories(${target} SYSTEM PRIVATE ${THRIFTATTN_CUBLASLT_INCLUDE})
  target_link_libraries(${target} PRIVATE ${CMAKE_DL_LIBS})
endfunction()

# test_cuda_emulated: tests/cuda over kernels that the CPU runs (emulator.h), as sm_90a; the tests that
# it does in seconds belong to `make test`. test_cuda_emulated_sm80 takes the paths of older GPUs; both,
# whole, by `make emulate`.
file(GLOB emulated_kernels CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/cuda/*.cu)
file(GLOB emulated_sources CONFIGURE_DEPENDS
  ${PROJECT_SOURCE_DIR}/src/cuda/*.cc ${CMAKE_CURRENT_SOURCE_DIR}/emulator/*.cc)
set_source_files_properties(${emulated_kernels} PROPERTIES
  LANGUAGE CXX COMPILE_OPTIONS "-include;emulator/language.h")

function(thriftattn_add_emulated_objects name)
  add_library(${name} OBJECT ${ARGN})
  # Before src: this folder's ptx.cuh, wgmma.cuh and dependent_launch.cuh.
  target_include_directories(${name} PRIVATE
    ${CMAKE_CURRENT_SOURCE_DIR}/emulator ${CMAKE_CURRENT_SOURCE_DIR}
    ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/include ${PROJECT_BINARY_DIR}/include)
  target_include_directories(${name} SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  target_compile_definitions(${name} PRIVATE THRIFTATTN_WITH_CUDA)
  # Kernels read memory as what they need, and leave to the compiler what a lane does not use.
  # At -O3 they take half as long again to compile, and run a few percent faster.
  target_compile_options(${name} PRIVATE -O2 -mavx2 -mf16c -mfma -fno-strict-aliasing -U_FORTIFY_SOURCE
    -Wno-unknown-pragmas -Wno-sign-compare -Wno-unused-parameter -Wno-maybe-uninitialized
    -Wno-deprecated-enum-enum-conversion)
  target_link_libraries(${name} PRIVATE fmt::fmt thriftattn_options)
endfunction()

# Without libthriftattn, so that nvcc has no part in it.
function(thriftattn_add_emulated_test name)
  target_link_libraries(${name} PRIVATE $<TARGET_FILE:thriftattn_test_support_objects>
    hwy::hwy TBB::tbb fmt::fmt nlohmann_json::nlohmann_json thriftattn_options
    GTest::gmock GTest::gtest_main Threads::Threads)
  add_dependencies(${name} thriftattn_test_support_objects)
endfunction()

thriftattn_add_emulated_objects(thriftattn_emulated ${emulated_kernels} ${emulated_sources})
add_executable(test_cuda_emulated ${sources_cuda} $<TARGET_OBJECTS:thriftattn_emulated>
  $<TARGET_OBJECTS:thriftattn_layers>)
thriftattn_add_emulated_test(test_cuda_emulated)

thriftattn_add_emulated_objects(thriftattn_emulated_sm80 ${emulated_kernels} ${emulated_sources})
target_compile_definitions(thriftattn_emulated_sm80 PRIVATE THRIFTATTN_EMULATE_SM80)
add_executable(test_cuda_emulated_sm80 EXCLUDE_FROM_ALL ${sources_cuda}
  $<TARGET_OBJECTS:thriftattn_emulated_sm80> $<TARGET_OBJECTS:thriftattn_layers>)
thriftattn_add_emulated_test(test_cuda_emulated_sm80)
set_target_properties(thriftattn_emulated_sm80 PROPERTIES EXCLUDE_FROM_ALL ON)

# Races in shared memory (races.h): kernels with the compiler's hooks for ThreadSanitizer, whose library
# stays out.
thriftattn_add_emulated_objects(thriftattn_emulated_races_kernels ${emulated_kernels})
target_compile_options(thriftattn_emulated_races_kernels PRIVATE -O1 -g1 -fsanitize=thread)
thriftattn_add_emulated_objects(thriftattn_emulated_races ${emulated_sources})
target_compile_definitions(thriftattn_emulated_races PRIVATE THRIFTATTN_EMULATE_RACES)
add_executable(test_cuda_emulated_races EXCLUDE_FROM_ALL ${sources_cuda}
  $<TARGET_OBJECTS:thriftattn_emulated_races_kernels> $<TARGET_OBJECTS:thriftattn_emulated_races>
  $<TARGET_OBJECTS:thriftattn_layers>)
thriftattn_add_emulated_test(test_cuda_emulated_races)
set_target_properties(thriftattn_emulated_races thriftattn_emulated_races_kernels PROPERTIES
  EXCLUDE_FROM_ALL ON)

# The engine's device code: its objects but two, the kernels and what calls cuBLASLt.
if(TARGET thriftattn_engine AND THRIFTATTN_CUBLASLT_INCLUDE)
  set(engine_kernels ${PROJECT_SOURCE_DIR}/src/engine/device_ops.cu)
  set_source_files_properties(${engine_kernels} PROPERTIES
    LANGUAGE CXX COMPILE_OPTIONS "-include;emulator/language.h")
  thriftattn_add_emulated_objects(thriftattn_engine_emulated ${engine_kernels}
    ${CMAKE_CURRENT_SOURCE_DIR}/emulator/engine/matrix_multiplier.cc)
  target_link_libraries(thriftattn_engine_emulated PRIVATE nlohmann_json::nlohmann_json)
  add_executable(test_engine_emulated engine/device_engine_test.cc
    $<TARGET_OBJECTS:thriftattn_engine_emulated> $<TARGET_OBJECTS:thriftattn_emulated>
    $<TARGET_OBJECTS:thriftattn_layers>)
  target_include_directories(test_engine_emulated PRIVATE
    ${CMAKE_CURRENT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/src
    ${PROJECT_SOURCE_DIR}/include ${PROJECT_BINARY_DIR}/include)
  target_compile_definitions(test_engine_emulated PRIVATE THRIFTATTN_WITH_CUDA
    THRIFTATTN_SOURCE_DIR="${PROJECT_SOURCE_DIR}" THRIFTATTN_BINARY_DIR="${PROJECT_BINARY_DIR}")
  target_link_libraries(test_engine_emulated PRIVATE $<TARGET_FILE:thriftattn_engine>
    DNNL::dnnl PkgConfig::pcre2 PkgConfig::xxhash)
  add_dependencies(test_engine_emulated thriftattn_engine)
  thriftattn_add_emulated_test(test_engine_emulated)
endif()

# Those that take the CPU more than five seconds are left to `make emulate`, but for two that say most.
set(long_ones
  CudaBudget.ManyPages CudaBudget.ScoresOfEveryRange CudaBudget.Shapes CudaBudget.TiesGoToTheLowerPage
  CudaGroups.LongContextsSkipAndPromote CudaGroups.RunsAreBitwiseEqual TwoDevices.APlanIsForItsDevice
  CudaAppend.GroupsByteEqualOverDataAndTypes CudaAppend.GroupsByteEqualOverShapesAndSteps
  CudaAttend.ChunksOfPages CudaAttend.RunsAreBitwiseEqual CudaAttend.Verify
  CudaBudget.RaggedBatchAndRepeats CudaBudget.VerifyAndLongerSteps
  CudaFailures.WithoutMemoryTheCacheStaysUsable
  CudaPlanes.BatchInvariantResultsAreThoseOfOneAlone CudaPlanes.GroupsThatDoNotDivideATile
  CudaPlanes.MoreUnitsThanBlocks CudaPlanes.OpenPagesEndAnywhere CudaPlanes.UnitsOfARaggedBatch
  CudaPrefill.PassesOverHeads CudaPrefill.PoliciesAndLengths CudaPrefill.RunsAreBitwiseEqual
  CudaPrefill.Shapes CudaThreads.AtOnceGiveTheBitsOfOneAlone
  TwoDevices.PlansOfTheSecondGiveTheBitsOfTheFirst
  # Each takes a second; these have the paths of three policies.
  "*/maxsavingsmx" "*/int3" "*/int3Kmxfp4Vsealed" "*/nvfp4Kint3Vpromote" "*/mxfp4promote"
  "*/bf16Kint3V" "*/fp8Kmxfp4V" "*/int3Kbf16V" "*/mxfp4Kfp8V")
list(JOIN long_ones ":" long_ones)
gtest_discover_tests(test_cuda_emulated DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60
  TEST_PREFIX cuda_emulated. TEST_FILTER "-${long_ones}" WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
  PROPERTIES TIMEOUT 300 LABELS cuda_emulated)
if(TARGET test_engine_emulated)
  gtest_discover_tests(test_engine_emulated DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60
    TEST_PREFIX engine_emulated. WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
    TEST_FILTER "DeviceTest.YarnMatches*:DeviceTest.Bf16Weights*:DeviceTest.RefusesWhat*:DeviceTest.SavedSessions*"
    PROPERTIES TIMEOUT 300 LABELS cuda_emulated)
endif()

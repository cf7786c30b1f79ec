# THRIFTATTN_BUILD_INFO: a source file with version and commit, brought up to date by each build.
set(THRIFTATTN_BUILD_INFO ${CMAKE_CURRENT_BINARY_DIR}/build_info.cc)
set(build_info_command ${CMAKE_COMMAND} -DSOURCE_DIR=${CMAKE_CURRENT_SOURCE_DIR}
    -DOUTPUT=${THRIFTATTN_BUILD_INFO} -DTHRIFTATTN_VERSION=${PROJECT_VERSION}
    -P ${CMAKE_CURRENT_SOURCE_DIR}/cmake/git_commit.cmake)
add_custom_target(thriftattn_build_info COMMAND ${build_info_command}
                  BYPRODUCTS ${THRIFTATTN_BUILD_INFO} COMMENT "")

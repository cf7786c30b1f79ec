# Writes build_info.cc; touches it only when the commit or the version changed. Without git, or
# in a tarball, the commit is "unknown".
set(THRIFTATTN_GIT_COMMIT "unknown")
find_program(GIT_PROGRAM git)
# A .git of our own: a tarball unpacked inside another repository must not take that one's commit.
if(GIT_PROGRAM AND EXISTS ${SOURCE_DIR}/.git)
  execute_process(COMMAND ${GIT_PROGRAM} describe --always --dirty --abbrev=12 --exclude=*
                  WORKING_DIRECTORY ${SOURCE_DIR} OUTPUT_VARIABLE described
                  OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
  if(NOT failed)
    set(THRIFTATTN_GIT_COMMIT ${described})
  endif()
endif()
configure_file(${SOURCE_DIR}/cmake/build_info.cc.in ${OUTPUT} @ONLY)

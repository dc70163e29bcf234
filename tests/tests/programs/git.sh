# A repository with a history, packed, checked, cloned in each way.
set -eu
export HOME=/tmp
git config --global user.name Tester
git config --global user.email tester@krx.test
git config --global init.defaultBranch main
git config --global advice.detachedHead false
cd /data
git init -q repository
cd repository
for turn in $(seq "$1"); do
    mkdir -p "part $turn"
    for file in 1 2 3; do seq "$turn" $((turn * 100)) >"part $turn/file $file"; done
    seq "$turn" 500 >changing
    git add .
    git commit -q -m "Turn $turn"
done
git switch -q -c side HEAD~1
echo aside >aside
chmod 755 aside
ln -s aside link
git add . && git commit -q -m Aside
git switch -q main
git merge -q -m Merge side
git tag -a -m Tagged v1
rm -r "part 1"
git checkout -q -- .
git gc -q --prune=now
git fsck --full --strict 2>/dev/null
test -z "$(git status --porcelain)"
test "$(find .git/objects -type f -path '*/??/*' ! -path '*/pack/*' ! -path '*/info/*' | wc -l)" = 0
cd ..
git clone -q repository linked
git clone -q --no-local repository sent
test "$(git -C sent rev-parse 'v1^{commit}')" = "$(git -C repository rev-parse HEAD)"
echo more >>linked/aside
git -C linked commit -q -a -m More
git -C linked push -q origin HEAD:refs/heads/more
git -C repository fsck --full --strict 2>/dev/null
for clone in linked sent repository; do
    echo "$(git -C $clone log --oneline main | wc -l) $(git -C $clone rev-parse 'main^{tree}') $(git -C $clone status --porcelain | wc -l)"
done

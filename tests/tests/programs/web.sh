# nginx serves what lies on the volume to many at once, and takes what is put.
set -eu
cd /data
mkdir www
head -c 3000000 /dev/urandom >www/large
echo small >www/small
cat >nginx.conf <<'C'
user nobody nogroup;
worker_processes 2;
pid /tmp/nginx.pid;
error_log stderr;
events {}
http {
    access_log off;
    client_body_temp_path /tmp/body;
    proxy_temp_path /tmp/proxy;
    fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi;
    scgi_temp_path /tmp/scgi;
    sendfile on;
    server {
        listen 127.0.0.1:8080;
        root /data/www;
        location /again/ { proxy_pass http://127.0.0.1:8080/; }
    }
}
C
nginx -c /data/nginx.conf
url=http://127.0.0.1:8080
for number in 1 2 3 4 5 6; do curl -sf "$url/large" -o "/tmp/large.$number" & done
wait
curl -sf "$url/again/large" -o /tmp/large.7
curl -sf -r 1000000-1999999 "$url/large" -o /tmp/part
sha256sum www/large /tmp/large.? | sed 's/ .*//' | while read -r sum; do
    [ "$sum" = "$(sha256sum www/large | sed 's/ .*//')" ] && echo same
done
tail -c +1000001 www/large | head -c 1000000 | sha256sum | sed 's/ .*//' >/tmp/wanted
sha256sum /tmp/part | sed 's/ .*//' | grep -qf /tmp/wanted && echo "same part"
curl -s -o /dev/null -w '%{http_code}\n' "$url/none"
nginx -c /data/nginx.conf -s quit
